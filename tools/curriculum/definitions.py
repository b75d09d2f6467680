"""What-is-X definitions and word pairs for translation, English and Chinese side by side."""

from __future__ import annotations

import random

# (English name, what it is, Chinese name, what it is)
DEFINITIONS = (
    ("a dog", "an animal that lives with people and guards the house", "狗", "一种和人住在一起、会看家的动物"),
    ("a cat", "a small animal that likes to catch mice", "猫", "一种喜欢抓老鼠的小动物"),
    ("a rabbit", "a small animal with long ears", "兔子", "一种耳朵长长的小动物"),
    ("a horse", "a strong animal that people can ride", "马", "一种人可以骑的、很强的动物"),
    ("a cow", "a big animal that eats grass and gives milk", "牛", "一种吃草的大动物，奶牛还会给我们牛奶"),
    ("a sheep", "an animal with soft white hair that eats grass", "羊", "一种毛软软的、吃草的动物"),
    ("a bird", "an animal that has two wings and can fly", "鸟", "一种有翅膀、会飞的动物"),
    ("a fish", "an animal that lives and swims in water", "鱼", "一种在水里游的动物"),
    ("a frog", "a small green animal that can jump and swim", "青蛙", "一种会跳会游的绿色小动物"),
    ("a bee", "a small insect that makes honey", "蜜蜂", "一种会做蜂蜜的小虫子"),
    ("a panda", "a black and white animal that eats bamboo", "熊猫", "一种黑白相间、爱吃竹子的动物"),
    ("an elephant", "a very big animal with a long nose", "大象", "一种鼻子长长的、很大的动物"),
    ("a monkey", "an animal that lives in the trees and likes bananas", "猴子", "一种住在树上、爱吃香蕉的动物"),
    ("a fox", "an animal with a big tail that lives in the forest", "狐狸", "一种住在森林里、尾巴很大的动物"),
    ("a bear", "a big animal that likes honey and sleeps in winter", "熊", "一种爱吃蜂蜜、冬天睡觉的大动物"),
    ("a tree", "a tall plant with many leaves", "树", "一种很高、有很多叶子的植物"),
    ("a flower", "a part of a plant that smells good", "花", "植物上好看又好闻的部分"),
    ("grass", "a low green plant that covers the ground", "草", "一种长在地上的绿色矮植物"),
    ("a seed", "a small thing that can grow into a plant", "种子", "可以长成植物的小东西"),
    ("fruit", "sweet food that grows on plants", "水果", "植物上长的甜甜的食物"),
    ("an apple", "a round fruit that is red or green", "苹果", "一种圆圆的、红色或绿色的水果"),
    ("bread", "food that is made from flour", "面包", "用面粉做的食物"),
    ("rice", "a plant whose white seeds people eat", "米饭", "用米做的白白的食物"),
    ("an egg", "round food that comes from a hen", "鸡蛋", "母鸡下的圆圆的食物"),
    ("milk", "a white drink that comes from cows", "牛奶", "奶牛给我们的白色饮料"),
    ("tea", "a hot drink that is made with leaves", "茶", "用茶叶做的热饮料"),
    ("a house", "a place where people live", "房子", "人们住的地方"),
    ("a school", "a place where children learn", "学校", "孩子们学习的地方"),
    ("a hospital", "a place where doctors help sick people", "医院", "医生给病人看病的地方"),
    ("a park", "a green place where people walk and play", "公园", "人们走路和玩耍的绿色地方"),
    ("a farm", "a place where people grow food and keep animals", "农场", "人们种菜、养动物的地方"),
    ("a garden", "a place where people grow flowers", "花园", "人们种花的地方"),
    ("a library", "a place with many books that people can read", "图书馆", "有很多书给人们看的地方"),
    ("a shop", "a place where people buy things", "商店", "人们买东西的地方"),
    ("a forest", "a big place with many trees", "森林", "有很多树的大地方"),
    ("a river", "a long line of water that goes to the sea", "河", "一条长长的、流到大海的水"),
    ("a lake", "a big piece of water with land on all sides", "湖", "四面都是陆地的一大片水"),
    ("the sea", "a very big place full of salt water", "大海", "有很多咸水的大地方"),
    ("a mountain", "a very high piece of land", "山", "一块很高很高的陆地"),
    ("a desert", "a dry place with a lot of sand", "沙漠", "很干、有很多沙子的地方"),
    ("the sun", "a star that gives us light and heat", "太阳", "一颗给我们光和热的恒星"),
    ("the moon", "a round ball that goes around the Earth", "月亮", "绕着地球转的圆球"),
    ("the Earth", "the planet that we live on", "地球", "我们住的行星"),
    ("a star", "a very hot ball in the sky that gives light", "星星", "天上会发光的小点"),
    ("rain", "water that falls from the clouds", "雨", "从云里落下来的水"),
    ("snow", "cold white water that falls in winter", "雪", "冬天落下来的、白白的小冰花"),
    ("ice", "water that is cold and hard", "冰", "又冷又硬的水"),
    ("wind", "air that moves", "风", "会动的空气"),
    ("a cloud", "many small drops of water in the sky", "云", "天上的很多小水点"),
    ("a rainbow", "a line of many colors in the sky after rain", "彩虹", "雨后天上的彩色的桥"),
    ("a car", "a thing with four wheels that people drive", "汽车", "有四个轮子、可以开的东西"),
    ("a bicycle", "a thing with two wheels that people ride", "自行车", "有两个轮子、可以骑的东西"),
    ("a train", "a long car that runs on two lines of iron", "火车", "在铁路上跑的长长的车"),
    ("a boat", "a thing that carries people on water", "船", "在水上带人走的东西"),
    ("a plane", "a thing that carries people through the sky", "飞机", "在天上带人飞的东西"),
    ("a bridge", "a road that goes over a river", "桥", "一条从河上过去的路"),
    ("a book", "a thing with many pages that we read", "书", "有很多页、给人看的东西"),
    ("a pen", "a thing that we write with", "笔", "我们写字用的东西"),
    ("a clock", "a thing that tells us the time", "时钟", "告诉我们时间的东西"),
    ("an umbrella", "a thing that keeps us dry in the rain", "雨伞", "下雨时帮我们挡雨的东西"),
    ("a lamp", "a thing that gives light at night", "灯", "晚上给我们光的东西"),
    ("a key", "a thing that opens a lock", "钥匙", "用来开锁的东西"),
    ("a door", "a thing that we open to go into a room", "门", "进房间时要打开的东西"),
    ("a bed", "a thing that people sleep on", "床", "人们睡觉用的东西"),
    ("a computer", "a machine that works with numbers and words", "电脑", "会算数、会写字的机器"),
    ("a friend", "a person who likes you and helps you", "朋友", "喜欢你、会帮助你的人"),
    ("a family", "people who live together and love each other", "家人", "住在一起、爱着对方的人"),
    ("a teacher", "a person who teaches children", "老师", "教孩子学习的人"),
    ("a doctor", "a person who helps sick people", "医生", "给病人看病的人"),
    ("a farmer", "a person who grows food", "农民", "种粮食和菜的人"),
    ("a story", "some words that tell what happened", "故事", "讲一件事的一段话"),
    ("a language model", "a program that learns to write from a lot of text", "语言模型", "从很多文字里学会写字的程序"),
)

QUESTIONS = {
    "en": (
        "What is {s}?",
        "Tell me what {s} is.",
        "Do you know what {s} is?",
        "Can you tell me what {s} is?",
        "Please say what {s} is.",
        "Say in a few words what {s} is.",
    ),
    "zh": ("什么是{s}？", "{s}是什么？", "告诉我什么是{s}。", "你知道{s}是什么吗？", "能告诉我{s}是什么吗？", "请说一说什么是{s}。"),
}
STATEMENTS = {
    "en": ("{S} is {a}.", "Do you know what {s} is? It is {a}.", "What is {s}? {S} is {a}."),
    "zh": ("{s}是{a}。", "你知道什么是{s}吗？它是{a}。", "什么是{s}？{s}是{a}。"),
}

# (English, Chinese): single words that the translation requests use.
WORDS = (
    ("apple", "苹果"),
    ("water", "水"),
    ("book", "书"),
    ("cat", "猫"),
    ("dog", "狗"),
    ("bird", "鸟"),
    ("fish", "鱼"),
    ("tree", "树"),
    ("flower", "花"),
    ("sun", "太阳"),
    ("moon", "月亮"),
    ("star", "星星"),
    ("rain", "雨"),
    ("snow", "雪"),
    ("wind", "风"),
    ("river", "河"),
    ("mountain", "山"),
    ("sea", "大海"),
    ("friend", "朋友"),
    ("teacher", "老师"),
    ("school", "学校"),
    ("house", "房子"),
    ("door", "门"),
    ("bed", "床"),
    ("hand", "手"),
    ("eye", "眼睛"),
    ("milk", "牛奶"),
    ("bread", "面包"),
    ("egg", "鸡蛋"),
    ("tea", "茶"),
    ("red", "红色"),
    ("blue", "蓝色"),
    ("green", "绿色"),
    ("white", "白色"),
    ("big", "大"),
    ("small", "小"),
    ("good", "好"),
    ("hot", "热"),
    ("cold", "冷"),
    ("happy", "高兴"),
    ("spring", "春天"),
    ("summer", "夏天"),
    ("autumn", "秋天"),
    ("winter", "冬天"),
    ("rabbit", "兔子"),
    ("bear", "熊"),
    ("car", "汽车"),
    ("boat", "船"),
    ("hello", "你好"),
    ("thank you", "谢谢"),
    ("goodbye", "再见"),
    ("good morning", "早上好"),
)


def _slots(row: tuple[str, str, str, str], lang: str) -> dict[str, str]:
    name, meaning = row[:2] if lang == "en" else row[2:]
    return {"s": name, "S": name[:1].upper() + name[1:], "a": meaning}


def question(row: tuple[str, str, str, str], lang: str, rng: random.Random) -> str:
    """One wording of "what is X"."""
    return rng.choice(QUESTIONS[lang]).format_map(_slots(row, lang))


def answer(row: tuple[str, str, str, str], lang: str) -> str:
    """The definition as one sentence."""
    return STATEMENTS[lang][0].format_map(_slots(row, lang))


def statement(row: tuple[str, str, str, str], lang: str, rng: random.Random) -> str:
    """The definition as prose."""
    return rng.choice(STATEMENTS[lang]).format_map(_slots(row, lang))
