"""A conversation of 200 turns, written for the tests of the memory: facts, changes of facts, and much that does not matter."""

from __future__ import annotations

FACTS = {
    1: "Hi, my name is Marlene.",
    2: "I live in Lisbon with my two children.",
    3: "My dog is called Biscuit, he is a beagle.",
    4: "I am allergic to peanuts.",
    5: "Please remember that the spare key is under the blue flowerpot.",
    6: "My sister Ingrid plays the cello in an orchestra.",
    7: "我最喜欢的颜色是墨绿色。",
    8: "我女儿叫小雨，在读二年级。",
    9: "我的生日是十月三号。",
    10: "记住：门禁密码是四零七二。",
    11: "我在一家植物园工作。",
    12: "我不吃香菜。",
    60: "I work as a beekeeper in the summer.",
    90: "My favourite author is Ursula Le Guin.",
    100: "I moved to Trondheim last week.",
    120: "我换工作了，现在在图书馆上班。",
    150: "My phone number is 555 0182.",
    160: "My phone number is 555 0999 now.",
}
"""Turn: what the user says then."""

QUESTIONS = [
    ("What is my name?", "Marlene"),
    ("Where do I live?", "Trondheim"),
    ("What's the name of my dog?", "Biscuit"),
    ("Which food am I allergic to?", "peanuts"),
    ("Where did I put the spare key?", "flowerpot"),
    ("What instrument does my sister play?", "cello"),
    ("我最喜欢什么颜色？", "墨绿色"),
    ("我女儿叫什么名字？", "小雨"),
    ("我的生日是哪天？", "十月三号"),
    ("门禁的密码是多少？", "四零七二"),
    ("我在哪里上班？", "图书馆"),
    ("点菜的时候我有什么不吃的？", "香菜"),
    ("Who is my favourite author?", "Le Guin"),
    ("What is my phone number?", "0999"),
]
"""Asked after turn 190, and a piece of the right answer."""

ACROSS = [
    ("我的狗叫什么？", "Biscuit"),
    ("When is my birthday?", "十月三号"),
    ("我现在住在哪里？", "Trondheim"),
    ("What is my daughter called?", "小雨"),
]
"""Asked in the other language than the fact was told in."""

OTHER = ["How do rainbows come about?", "What is the boiling point of iron?", "怎样折一只纸飞机？", "Translate 'good luck' into Spanish."]
"""To these the memory has nothing to say."""

_FILLERS = [
    "Hello again!",
    "ok",
    "Thanks!",
    "What is the capital of Peru?",
    "Tell me something about volcanoes number {n}.",
    "The weather is rather grey today.",
    "今天天气不错。",
    "什么是光合作用？",
    "给我讲一个关于第{n}只企鹅的故事。",
    "好的，谢谢。",
    "I saw {n} sheep on a hill and thought of a song.",
    "Can you explain how a bicycle stays upright?",
    "That was interesting.",
    "我刚才看了第{n}集电视剧，挺有意思。",
]
_ANSWERS = [
    "Volcanoes are openings through which melted rock reaches the surface.",
    "The capital of Peru is Lima.",
    "从前有一只企鹅，它住在南极。",
    "植物用阳光、水和二氧化碳制造养分。",
    "You are welcome.",
]


def turn(number: int) -> tuple[str, str]:
    """What user and assistant say in turn `number`, from 1."""
    filler = _FILLERS[number % len(_FILLERS)].format(n=number)
    return FACTS.get(number, filler), _ANSWERS[number % len(_ANSWERS)]


UNSEEN = [
    ("Just so you know, I go by Theo.", "How should you address me?", "Theo"),
    ("We have a parrot that swears, called Captain.", "What do we call our parrot?", "Captain"),
    ("My flight to Osaka leaves on Friday at 7:40.", "When does my plane take off?", "7:40"),
    ("I can't stand mushrooms.", "Is there any food I hate?", "mushrooms"),
    ("My grandmother grew up in Tbilisi.", "Where does my grandmother come from?", "Tbilisi"),
    ("I teach chemistry at a night school.", "What is my job?", "chemistry"),
    ("The wifi password at home is bluewhale77.", "What's our wifi password?", "bluewhale77"),
    ("I finally passed my driving test on the fourth try.", "How many tries did my driving test take?", "fourth"),
    ("My knee has been hurting since the marathon.", "Which part of my body hurts?", "knee"),
    ("I'm saving up for a second-hand trombone.", "What am I saving money for?", "trombone"),
    ("Our anniversary is on the 14th of May.", "What date is our anniversary?", "14th of May"),
    ("My best friend Oksana runs a bakery.", "Who has a bakery?", "Oksana"),
    ("我叫陈屿，大家都喊我小屿。", "你还记得我叫什么吗？", "陈屿"),
    ("我家养了两只乌龟，一只叫慢慢，一只叫快快。", "我家的乌龟叫什么名字？", "慢慢"),
    ("我对花粉过敏，一到春天就打喷嚏。", "我对什么东西过敏？", "花粉"),
    ("我下周三要去苏州出差。", "我什么时候去苏州？", "下周三"),
    ("我爸退休前是火车司机。", "我爸爸以前做什么工作？", "火车司机"),
    ("我最近在学吹口琴。", "我在学什么乐器？", "口琴"),
    ("我的车牌尾号是 38K。", "我的车牌号最后几位是什么？", "38K"),
    ("我和女朋友是在图书馆认识的。", "我在哪里认识了女朋友？", "图书馆"),
    ("我晚上十一点以后不喝茶，不然睡不着。", "我几点以后不能喝茶？", "十一点"),
    ("我弟弟在青岛读海洋生物。", "我弟弟学的是什么专业？", "海洋生物"),
    ("我老家在大理，家里种核桃。", "我的老家是哪里？", "大理"),
    ("我的血型是 AB 型。", "我是什么血型？", "AB"),
]
"""(told from turn 5 on, asked after turn 190, piece of the answer): written after the rules were, which were not changed for them."""
