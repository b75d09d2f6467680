"""The facts of the curriculum as plain tables: one row per fact, English and Chinese side by side.

A row is (English subject, English answer, Chinese subject, Chinese answer); the rows of COUNTS carry a unit after
each subject. How the rows become questions, answers and prose is in `facts.py`.
"""

from __future__ import annotations

CAPITALS = (
    ("China", "Beijing", "中国", "北京"),
    ("Japan", "Tokyo", "日本", "东京"),
    ("France", "Paris", "法国", "巴黎"),
    ("Germany", "Berlin", "德国", "柏林"),
    ("Italy", "Rome", "意大利", "罗马"),
    ("Spain", "Madrid", "西班牙", "马德里"),
    ("Russia", "Moscow", "俄罗斯", "莫斯科"),
    ("Egypt", "Cairo", "埃及", "开罗"),
    ("India", "New Delhi", "印度", "新德里"),
    ("Thailand", "Bangkok", "泰国", "曼谷"),
    ("Greece", "Athens", "希腊", "雅典"),
    ("Canada", "Ottawa", "加拿大", "渥太华"),
    ("Vietnam", "Hanoi", "越南", "河内"),
    ("South Korea", "Seoul", "韩国", "首尔"),
    ("Portugal", "Lisbon", "葡萄牙", "里斯本"),
    ("the United Kingdom", "London", "英国", "伦敦"),
    ("the United States", "Washington", "美国", "华盛顿"),
)

SOUNDS = (
    ("a cat", "meow", "猫", "喵喵"),
    ("a dog", "woof", "狗", "汪汪"),
    ("a duck", "quack", "鸭子", "嘎嘎"),
    ("a cow", "moo", "牛", "哞哞"),
    ("a sheep", "baa", "羊", "咩咩"),
    ("a frog", "croak", "青蛙", "呱呱"),
    ("a bee", "buzz", "蜜蜂", "嗡嗡"),
    ("a bird", "tweet", "小鸟", "叽叽"),
    ("a pig", "oink", "猪", "哼哼"),
    ("a mouse", "squeak", "老鼠", "吱吱"),
)

HOMES = (
    ("a fish", "in the water", "鱼", "水里"),
    ("a bird", "in a nest", "鸟", "鸟窝里"),
    ("a bee", "in a hive", "蜜蜂", "蜂巢里"),
    ("a rabbit", "in a hole", "兔子", "洞里"),
    ("a camel", "in the desert", "骆驼", "沙漠里"),
    ("a penguin", "at the South Pole", "企鹅", "南极"),
    ("a polar bear", "at the North Pole", "北极熊", "北极"),
    ("a monkey", "in the trees", "猴子", "树上"),
    ("a panda", "in the bamboo forest", "熊猫", "竹林里"),
    ("a whale", "in the sea", "鲸鱼", "大海里"),
    ("an ant", "under the ground", "蚂蚁", "地下"),
    ("a lion", "on the grassland", "狮子", "草原上"),
)

FOODS = (
    ("a panda", "bamboo", "熊猫", "竹子"),
    ("a cow", "grass", "牛", "草"),
    ("a rabbit", "carrots", "兔子", "胡萝卜"),
    ("a monkey", "bananas", "猴子", "香蕉"),
    ("a cat", "fish", "猫", "鱼"),
    ("a squirrel", "nuts", "松鼠", "坚果"),
    ("a frog", "insects", "青蛙", "虫子"),
    ("a lion", "meat", "狮子", "肉"),
    ("a chicken", "rice", "鸡", "米"),
    ("a dog", "bones", "狗", "骨头"),
)

COLORS = (
    ("the sky", "blue", "天空", "蓝色"),
    ("the sea", "blue", "大海", "蓝色"),
    ("grass", "green", "草", "绿色"),
    ("a leaf", "green", "树叶", "绿色"),
    ("snow", "white", "雪", "白色"),
    ("milk", "white", "牛奶", "白色"),
    ("blood", "red", "血", "红色"),
    ("a strawberry", "red", "草莓", "红色"),
    ("coal", "black", "煤", "黑色"),
    ("a banana", "yellow", "香蕉", "黄色"),
    ("a lemon", "yellow", "柠檬", "黄色"),
    ("a carrot", "orange", "胡萝卜", "橙色"),
    ("chocolate", "brown", "巧克力", "棕色"),
    ("an eggplant", "purple", "茄子", "紫色"),
    ("an elephant", "gray", "大象", "灰色"),
)

COUNTS = (
    ("a week", "days", "seven", "一周", "天", "七"),
    ("a year", "months", "twelve", "一年", "个月", "十二"),
    ("a year", "seasons", "four", "一年", "个季节", "四"),
    ("a day", "hours", "twenty-four", "一天", "个小时", "二十四"),
    ("an hour", "minutes", "sixty", "一小时", "分钟", "六十"),
    ("a minute", "seconds", "sixty", "一分钟", "秒", "六十"),
    ("a season", "months", "three", "一个季节", "个月", "三"),
    ("a dog", "legs", "four", "狗", "条腿", "四"),
    ("a spider", "legs", "eight", "蜘蛛", "条腿", "八"),
    ("an ant", "legs", "six", "蚂蚁", "条腿", "六"),
    ("a bird", "legs", "two", "鸟", "条腿", "两"),
    ("a hand", "fingers", "five", "一只手", "根手指", "五"),
    ("a person", "eyes", "two", "人", "只眼睛", "两"),
    ("a triangle", "sides", "three", "三角形", "条边", "三"),
    ("a square", "sides", "four", "正方形", "条边", "四"),
    ("a bicycle", "wheels", "two", "自行车", "个轮子", "两"),
    ("a car", "wheels", "four", "汽车", "个轮子", "四"),
    ("an octopus", "arms", "eight", "章鱼", "条手臂", "八"),
)

# Each pair is asked in both directions.
OPPOSITES = (
    ("big", "small", "大", "小"),
    ("hot", "cold", "热", "冷"),
    ("tall", "short", "高", "矮"),
    ("fast", "slow", "快", "慢"),
    ("up", "down", "上", "下"),
    ("left", "right", "左", "右"),
    ("heavy", "light", "重", "轻"),
    ("new", "old", "新", "旧"),
    ("happy", "sad", "高兴", "难过"),
    ("black", "white", "黑", "白"),
    ("hard", "soft", "硬", "软"),
    ("wet", "dry", "湿", "干"),
    ("full", "empty", "满", "空"),
    ("far", "near", "远", "近"),
    ("early", "late", "早", "晚"),
    ("good", "bad", "好", "坏"),
)

SEASONS = (
    ("Flowers open", "spring", "开花", "春天"),
    ("It is very hot", "summer", "天气最热", "夏天"),
    ("Leaves turn yellow and fall", "autumn", "树叶变黄落下", "秋天"),
    ("It is very cold and it snows", "winter", "天气最冷，会下雪", "冬天"),
)

DAYS = (
    ("Monday", "Tuesday", "星期一", "星期二"),
    ("Tuesday", "Wednesday", "星期二", "星期三"),
    ("Wednesday", "Thursday", "星期三", "星期四"),
    ("Thursday", "Friday", "星期四", "星期五"),
    ("Friday", "Saturday", "星期五", "星期六"),
    ("Saturday", "Sunday", "星期六", "星期日"),
    ("Sunday", "Monday", "星期日", "星期一"),
)

BODY = (
    ("see", "eyes", "看东西", "眼睛"),
    ("hear", "ears", "听声音", "耳朵"),
    ("smell", "nose", "闻气味", "鼻子"),
    ("taste", "tongue", "尝味道", "舌头"),
    ("walk", "feet", "走路", "脚"),
    ("bite", "teeth", "咬东西", "牙齿"),
    ("think", "brain", "想问题", "大脑"),
    ("hold things", "hands", "拿东西", "手"),
)

RECORDS = (
    ("the biggest animal on land", "the elephant", "陆地上最大的动物", "大象"),
    ("the biggest animal in the sea", "the blue whale", "海里最大的动物", "蓝鲸"),
    ("the tallest animal", "the giraffe", "最高的动物", "长颈鹿"),
    ("the fastest animal on land", "the cheetah", "陆地上跑得最快的动物", "猎豹"),
    ("the biggest ocean", "the Pacific Ocean", "最大的海洋", "太平洋"),
    ("the biggest country", "Russia", "最大的国家", "俄罗斯"),
    ("the highest mountain", "Mount Everest", "最高的山峰", "珠穆朗玛峰"),
    ("the star that is nearest to us", "the sun", "离我们最近的恒星", "太阳"),
)

JOBS = (
    ("teaches children at school", "a teacher", "在学校教孩子", "老师"),
    ("helps sick people", "a doctor", "给病人看病", "医生"),
    ("grows rice and vegetables", "a farmer", "种米和菜", "农民"),
    ("puts out fires", "a firefighter", "灭火", "消防员"),
    ("drives a bus", "a driver", "开公共汽车", "司机"),
    ("cooks food in a restaurant", "a cook", "在饭店做饭", "厨师"),
    ("writes books", "a writer", "写书", "作家"),
    ("flies a plane", "a pilot", "开飞机", "飞行员"),
)

TOOLS = (
    ("cut paper", "scissors", "剪纸", "剪刀"),
    ("write words", "a pen", "写字", "笔"),
    ("stay dry in the rain", "an umbrella", "挡雨", "雨伞"),
    ("tell the time", "a clock", "看时间", "时钟"),
    ("open a lock", "a key", "开锁", "钥匙"),
    ("sweep the floor", "a broom", "扫地", "扫帚"),
    ("brush teeth", "a toothbrush", "刷牙", "牙刷"),
    ("drink water", "a cup", "喝水", "杯子"),
)

# (question, the same question in words kept for the probes, answer sentence, answer) in English, then in Chinese.
SCIENCE = (
    (
        "What gives us light in the day?",
        "Where does the light of the day come from?",
        "The sun gives us light in the day.",
        "the sun",
        "白天是什么给我们光？",
        "白天的光是从哪里来的？",
        "白天太阳给我们光。",
        "太阳",
    ),
    (
        "What goes around the Earth?",
        "Which ball in the sky moves around our Earth?",
        "The moon goes around the Earth.",
        "the moon",
        "什么绕着地球转？",
        "天上哪个球绕着我们的地球转？",
        "月亮绕着地球转。",
        "月亮",
    ),
    (
        "What does water turn into when it is very cold?",
        "In the cold, water becomes what?",
        "Very cold water turns into ice.",
        "ice",
        "水很冷的时候会变成什么？",
        "天很冷，水就成了什么？",
        "水很冷的时候会变成冰。",
        "冰",
    ),
    (
        "What does water turn into when it is very hot?",
        "In great heat, water becomes what?",
        "Very hot water turns into steam.",
        "steam",
        "水很热的时候会变成什么？",
        "把水烧热，水就成了什么？",
        "水很热的时候会变成水蒸气。",
        "水蒸气",
    ),
    (
        "What do we breathe?",
        "What goes in and out of us when we breathe?",
        "We breathe air.",
        "air",
        "我们呼吸的是什么？",
        "人一直在呼吸什么东西？",
        "我们呼吸的是空气。",
        "空气",
    ),
    (
        "What do bees make?",
        "Which sweet thing comes from bees?",
        "Bees make honey.",
        "honey",
        "蜜蜂会做什么？",
        "哪种甜甜的东西是蜜蜂做的？",
        "蜜蜂会做蜂蜜。",
        "蜂蜜",
    ),
    (
        "What do cows give us?",
        "Which white drink comes from cows?",
        "Cows give us milk.",
        "milk",
        "奶牛给我们什么？",
        "哪种白白的饮料来自奶牛？",
        "奶牛给我们牛奶。",
        "牛奶",
    ),
    (
        "What do hens lay?",
        "Which food comes from hens?",
        "Hens lay eggs.",
        "eggs",
        "母鸡会下什么？",
        "哪种食物来自母鸡？",
        "母鸡会下鸡蛋。",
        "鸡蛋",
    ),
    (
        "What is bread made from?",
        "Which white powder do we need for bread?",
        "Bread is made from flour.",
        "flour",
        "面包是用什么做的？",
        "想做面包要准备什么？",
        "面包是用面粉做的。",
        "面粉",
    ),
    (
        "What can we see in the sky after rain?",
        "The rain stops and the sun comes out. What is in the sky?",
        "After rain we can see a rainbow in the sky.",
        "a rainbow",
        "雨后天上会有什么？",
        "雨停了，太阳出来了，天上有什么？",
        "雨后天上会有彩虹。",
        "彩虹",
    ),
    (
        "Where does the sun come up?",
        "On which side does the sun come up in the morning?",
        "The sun comes up in the east.",
        "the east",
        "太阳从哪边升起？",
        "早上太阳是哪一边出来的？",
        "太阳从东边升起。",
        "东边",
    ),
    (
        "Where does the sun go down?",
        "On which side does the sun go down in the evening?",
        "The sun goes down in the west.",
        "the west",
        "太阳从哪边落下？",
        "晚上太阳是哪一边下山的？",
        "太阳从西边落下。",
        "西边",
    ),
)
