"""What a message tells about the one who wrote it: how much it matters, what it is about, which earlier fact it replaces, its gist.

Rules over Chinese and English text, the same answer every time; nothing here is learnt. `importance` documents its table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from inference.lexical import HAN, sentences, stem, words

KEY_FACT = 0.5
"""From this importance on, a sentence is kept word for word when memories are compressed."""

# topic: (English words, Chinese words)
_TOPICS: dict[str, tuple[str, str]] = {
    "name": ("name call nickname surname", "名字 姓名 叫 姓什么 贵姓 称呼 昵称 网名"),
    "home": (
        "live home house address moved move apartment flat city town hometown neighbour",
        "住在 住哪 我住 居住 家住 住处 家在 搬 地址 城市 老家 公寓 邻居",
    ),
    "work": ("work job company boss colleague office career profession salary employer", "工作 上班 公司 职业 老板 同事 工资 行业"),
    "study": (
        "school university college study student exam class homework major teacher",
        "学校 大学 学习 学生 考试 专业 作业 上学 老师",
    ),
    "family": (
        "family mother father mum mom dad parent sister brother wife husband partner son daughter child children kid grandmother "
        "grandfather aunt uncle cousin",
        "家人 妈妈 爸爸 母亲 父亲 父母 姐姐 妹妹 哥哥 弟弟 妻子 老婆 丈夫 老公 儿子 女儿 孩子 "
        "奶奶 爷爷 外婆 外公 姑姑 叔叔 表哥 表姐 表弟 表妹",
    ),
    "friends": ("friend girlfriend boyfriend roommate", "朋友 闺蜜 室友 同学"),
    "pets": ("pet dog cat puppy kitten rabbit hamster parrot fish", "宠物 狗 猫 兔子 仓鼠 鹦鹉 养了"),
    "food": (
        "eat food cook dish restaurant meal dinner lunch breakfast vegetarian vegan drink coffee tea",
        "吃 喝 菜 饭 餐 素食 咖啡 茶",
    ),
    "health": (
        "allergic allergy sick ill doctor medicine hospital pain sleep health diet",
        "过敏 生病 医生 药 医院 疼 痛 睡眠 健康 失眠",
    ),
    "dates": ("birthday born anniversary appointment deadline wedding", "生日 出生 纪念日 预约 截止 婚礼 约了"),
    "age": ("age old", "岁 年龄 多大 年纪"),
    "travel": ("travel trip holiday vacation flight train visit hotel abroad", "旅行 旅游 航班 飞机 火车 酒店 出国 假期"),
    "sport": (
        "sport run swim football basketball tennis gym hike marathon bike cycle yoga",
        "运动 跑步 游泳 足球 篮球 网球 健身 爬山 马拉松 骑车 瑜伽",
    ),
    "music": ("music song band guitar piano sing concert violin", "音乐 歌 乐队 吉他 钢琴 唱 小提琴"),
    "stories": ("book novel read film movie series author", "书 小说 读 电影 电视剧 作者"),
    "colour": ("colour color", "颜色"),
    "contact": ("phone email telephone contact", "电话 手机 邮箱 号码 微信 联系"),
    "language": ("language speak mother tongue", "语言 母语 会说"),
}
_STEMS = {name: {stem(word) for word in english.split()} for name, (english, _) in _TOPICS.items()}
_HAN_WORDS = {name: chinese.split() for name, (_, chinese) in _TOPICS.items()}

_ASKED_TO_KEEP = re.compile(r"\b(?:remember (?:that|this|my|to|:)|(?:don'?t|do not|never) forget|keep in mind|make a note|note that)", re.I)
_ASKED_TO_KEEP_ZH = re.compile(r"(?:请|要|帮我|给我|你|^)(?:记住|记得|记下|记一下|牢记)(?!吗|不|什么|多少)|别忘|不要忘|(?:^|[，。])记住")
_QUESTION = re.compile(
    r"[?？]\s*$|^(?:what|who|whose|which|where|when|why|how|do|does|did|is|are|was|were|am|can|could|would|will|should|have|has)\b"
    r"|(?:吗|呢)[。!！~]*$|什么|怎么|怎样|为何|哪[里儿个些]|(?<!不管)谁|几[点个岁号月次]|多少|多大|是不是|有没有|能不能|可不可以",
    re.I,
)
_SMALL_TALK = re.compile(
    r"(?:hi|hey|hello|yo|good (?:morning|evening|night|afternoon)|bye|goodbye|see you.*|thanks?(?: you)?(?: so much| a lot| very much)?|"
    r"ok(?:ay)?|yes|no|yeah|yep|nope|sure|great|cool|nice|wow|lol|haha+|hm+|i see|got it|all right|alright|well|right|good|fine|"
    r"你好呀?|您好|嗨+|哈喽|早上好|早安?|晚上好|晚安|下午好|再见|拜拜|谢谢[你您啦]*|多谢|感谢|好的?[呀吧啊]?|嗯+|哦+|哈+|是的?|对[的呀啊]?|行|不是|没事|"
    r"知道了|明白了?|原来如此|太好了|不错|真的)(?:[\s,.!?，。！？~～…]|there|all|everyone|again|大家|那|啊|呀|哦)*",
    re.I,
)
_REQUEST = re.compile(
    r"^(?:(?:please|now|then|so|hey)[, ]+)*(?:tell|give|write|translate|explain|show|make|list|summari[sz]e|describe|help|find|create|sing|"
    r"draw|calculate|suggest|recommend|compare|say|read|let's|let me)\b"
    r"|^(?:请|麻烦|那|再|能否)*(?:你|您)?(?:帮我|给我|替我|为我|写|讲|说说|翻译|解释|介绍|列出|总结|概括|画|算|计算|推荐|告诉我|教我|把)",
    re.I,
)
_LIKING = re.compile(
    r"\bI(?:'m| am)?\s+(?:\w+\s+){0,2}?(?:like|love|enjoy|hate|prefer|adore|dislike|allergic|afraid|interested|fond|can'?t stand)\b"
    r"|\bI (?:don'?t|do not|can'?t|cannot|never) (?:like|eat|drink|stand)\b|\bmy favou?rite\b"
    r"|\bI(?:'m| am) (?:an? )?(?:vegetarian|vegan)\b",
    re.I,
)
_LIKING_ZH = re.compile(
    r"我[们]?(?:真的|也|很|最|不|特别|非常|比较|更|一直|从小|对.{1,8}?){0,4}(?:喜欢|爱|讨厌|害怕|怕|过敏|感兴趣|不吃|不喝|吃素)|我最.{1,6}的.{1,6}是"
)
_NUMBER = re.compile(
    r"\d|\b(?:january|february|march|april|june|july|august|september|october|november|december|monday|tuesday|wednesday|thursday|friday|"
    r"saturday|sunday|tomorrow|tonight|next (?:week|month|year))\b"
    r"|[一二三四五六七八九十]+[月号日点岁年]|明天|后天|下周|下个月|明年|星期|周[一二三四五六日末]",
    re.I,
)
_ABOUT_SELF = re.compile(r"\b(?:I|my|mine|we|our|I'm|I've)\b|我|咱", re.I)

# What a sentence says of its writer that can only have one value at a time. A group, where there is one, is a part of the name.
_KIN = "妈妈|爸爸|母亲|父亲|姐姐|妹妹|哥哥|弟弟|妻子|老婆|丈夫|老公|儿子|女儿|奶奶|爷爷|女朋友|男朋友|老板|邻居"
_SLOTS = [
    ("name", re.compile(r"\bmy (?:full |first |last |real )?name(?:'s| is| was)|\bcall me\b|\bI(?:'m| am) called\b", re.I)),
    ("name", re.compile(r"我的?(?:名字|姓名)|我(?:现在)?(?:叫|改名)|(?:叫|称呼|喊)我|我姓")),
    (
        "home",
        re.compile(r"\bI(?:'m|'ve| am| have)? (?:\w+ ){0,2}?(?:live|living|moved|moving)\b|\bmy (?:new )?(?:home|address|flat) is", re.I),
    ),
    ("home", re.compile(r"我们?家?(?:现在|目前|刚|已经|最近|是)*(?:住|搬)|我家在")),
    ("age", re.compile(r"\bI(?:'m| am|'ve turned| turned) (?:now )?\d{1,3}\b(?! ?(?:%|percent|minutes|metres|cm|km|kg))", re.I)),
    ("age", re.compile(rf"我(?:今年|现在|已经|刚|满)*[\d一二三四五六七八九十]+岁(?![{HAN}])")),
    (
        "work",
        re.compile(r"\bI(?:'m| am)? (?:\w+ )?(?:work|working) (?:as|at|for|in)\b|\b(?:my|a) new job\b|\bmy (?:current )?job is", re.I),
    ),
    ("work", re.compile(r"我(?:现在|目前|换到|去了)*在.{1,12}(?:工作|上班)|我(?:换|找到).{0,3}工作|我的(?:工作|职业)是")),
    ("favourite {}", re.compile(r"\bmy favou?rite (\w+) (?:is|are|has)", re.I)),
    ("favourite {}", re.compile(r"我最(?:喜欢|爱)的(.{1,6}?)(?:是|叫|变成)")),
    (
        "my {}",
        re.compile(
            r"\bmy (?:new |old |current |own )?(?!new |name|favou?rite|home|address|flat|job|current )([a-z][a-z' -]{1,30}?)"
            r"(?: is| are| was|'s (?:called|named)| will be| has changed)\b",
            re.I,
        ),
    ),
    ("my {}", re.compile(rf"我的(?!名字|姓名|工作|职业)([{HAN}A-Za-z]{{1,8}}?)(?:现在|已经)?(?:是|叫|在|变成|换成|改成|改到)")),
    ("my {}", re.compile(rf"我({_KIN})(?:现在|已经)?(?:是|叫|在|住)")),
]


@lru_cache(maxsize=1 << 17)
def slots(text: str) -> frozenset[str]:
    """Names of what a text says about its writer where a later text replaces an earlier one: "home" of "I moved to Berlin" and of
    我住在巴黎, "my dog" of "My dog is called Biscuit". Questions say nothing."""
    found = set()
    for sentence in sentences(text):
        if not _QUESTION.search(sentence):
            for name, pattern in _SLOTS:
                found |= {name.format(*(group.lower() for group in match.groups())) for match in pattern.finditer(sentence)}
    return frozenset(found)


@lru_cache(maxsize=1 << 17)
def importance(text: str, role: str = "user") -> tuple[float, str]:
    """How much a message matters, from 0 to 1, and why: that of its most important sentence by this table.

    1.0 asked to be remembered · 0.9 the writer's name · 0.7 a fact about the writer that can change (`slots`), or what they like, hate, or
    must not eat · 0.45 about the writer otherwise · 0.3 any statement · 0.1 a question or a request · 0.05 small talk. A number or a date
    adds 0.15 to a statement. What the assistant said counts half.
    """
    value, reason = max((_sentence_importance(sentence) for sentence in sentences(text)), default=(0.0, "empty"))
    return round(value / 2 if role == "assistant" else value, 3), reason


def topics(text: str) -> list[str]:
    """What a text is about: the topics of the table whose words it has, then at most three of its other words."""
    found = words(text)
    stems = {stem(word) for word in found}
    named = [name for name in _TOPICS if stems & _STEMS[name] or any(word in text for word in _HAN_WORDS[name])]
    known = {word for name in named for word in _STEMS[name]}
    telling = [
        word
        for word in dict.fromkeys(found)
        if len(word) > (1 if re.match(f"[{HAN}]", word) else 3)
        and stem(word) not in known
        and not any(part in word for name in named for part in _HAN_WORDS[name])
    ]
    return named + telling[:3]


def named_topics(text: str) -> list[str]:
    """The topics of the table alone: the same for a question and the fact that answers it, also in the other language."""
    return [topic for topic in topics(text) if topic in _TOPICS]


def key_facts(texts: Sequence[str]) -> list[str]:
    """The sentences that must not get lost, in their order, each once."""
    return list(dict.fromkeys(sentence for text in texts for sentence in sentences(text) if _sentence_importance(sentence)[0] >= KEY_FACT))


def extractive_summary(texts: Sequence[str], limit: int) -> str:
    """The sentences of `texts` that matter most, one a line in their order, at most `limit` characters. Importance comes first, then how
    common a sentence's words are in all of the texts (SumBasic: Nenkova and Vanderwende, 2005), then the later one. Questions and small
    talk are left out."""
    every = list(dict.fromkeys(sentence for text in reversed(texts) for sentence in reversed(sentences(text))))[::-1]
    split = [words(sentence) for sentence in every]
    counts = Counter(word for found in split for word in found)
    ranked = sorted(
        (
            (_sentence_importance(sentence)[0], sum(counts[word] for word in found) / max(len(found), 1), place)
            for place, (sentence, found) in enumerate(zip(every, split, strict=True))
        ),
        reverse=True,
    )
    taken: list[int] = []
    room = limit
    for value, _, place in ranked:
        if value > 0.1 and len(every[place]) <= room:
            taken.append(place)
            room -= len(every[place]) + 1
    return "\n".join(every[place] for place in sorted(taken))


def _sentence_importance(sentence: str) -> tuple[float, str]:
    parts = [part.strip() for part in re.split("[,，、]", sentence) if part.strip()]
    if all(_SMALL_TALK.fullmatch(part) for part in parts):
        return 0.05, "small talk"
    question = bool(_QUESTION.search(sentence))
    if (_ASKED_TO_KEEP.search(sentence) or _ASKED_TO_KEEP_ZH.search(sentence)) and not sentence.rstrip().endswith(("?", "？", "吗")):
        return 1.0, "asked to be remembered"
    if question or _REQUEST.search(sentence):
        return 0.1, "a question" if question else "a request"
    named = slots(sentence)
    if "name" in named:
        value, reason = 0.9, "a name"
    elif _LIKING.search(sentence) or _LIKING_ZH.search(sentence):
        value, reason = 0.7, "a preference"
    elif named:
        value, reason = 0.7, "a fact about the writer"
    elif _ABOUT_SELF.search(sentence):
        value, reason = 0.45, "about the writer"
    else:
        value, reason = 0.3, "a statement"
    if _NUMBER.search(sentence):
        return min(value + 0.15, 0.95), f"{reason}, with a number or a date"
    return value, reason
