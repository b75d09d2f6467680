"""What a message asks for: rules over Chinese and English that a reader can follow.

    detect("把“早上好”翻译成法语")      # Intent(name="translation", score=3.0, cues=("翻译",), scores={"translation": 3.0})

Each rule that finds its pattern adds its weight to an intent, once; the highest sum wins if it is 1 or more, else it is `chat`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# In the order in which equal sums are decided: (Chinese, English) for people to read.
INTENTS = {
    "translation": ("翻译", "translation"),
    "summary": ("总结", "a summary"),
    "role": ("角色扮演", "playing a role"),
    "code": ("编程", "code"),
    "writing": ("写作", "creative writing"),
    "reasoning": ("推理计算", "reasoning"),
    "question": ("问答", "a question"),
    "chat": ("聊天", "chat"),
}

# Parts of the patterns below.
_PARTS = {
    "tongue": (
        r"(?:english|chinese|mandarin|cantonese|french|german|spanish|italian|portuguese|russian|japanese|korean|arabic|latin|"
        r"greek|dutch|hindi|turkish|swedish|polish)"
    ),
    "tongue_zh": r"(?:英|中|汉|日|法|德|韩|俄|粤|西班牙|意大利|葡萄牙|阿拉伯|拉丁)[语文]",
    "make": (
        r"(?:write|compose|draft|create|invent|make up|tell|come up with|finish|continue|give me|need|(?:would|'d) like|want|generate|"
        r"construct|produce)"
    ),
    "piece": (
        r"(?:poems?|haikus?|sonnets?|stor(?:y|ies)|tales?|novels?|songs?|lyrics|essays?|letters?|e-?mails?|speech(?:es)?|"
        r"slogans?|jokes?|articles?|blog|posts?|captions?|dialogues?|toasts?|fables?|limericks?|riddles?|descriptions?|reviews?|"
        r"advert\w*|headlines?|plays?|diary|invitations?|paragraphs?|messages?|tweets?|quotes?|dialogs?|names? for)"
    ),
    "piece_zh": (
        r"(?:诗|词牌|故事|童话|寓言|小说|作文|文章|短文|散文|文字|段子|笑话|歌词|信(?!息)|邮件|文案|演讲|发言稿|广告|标语|口号|标题|"
        r"日记|对联|绝句|谜语|剧本|台词|祝福|贺词|评论|游记|俳句|推文|名字)"
    ),
    "programming": (
        r"(?:python|java|javascript|typescript|c\+\+|c#|sql|html|css|bash|linux|git|github|docker|golang|rust|php|ruby|kotlin|"
        r"swift|matlab|react|vue|django|flask|numpy|pandas|pytorch|regex|json|yaml|xml|excel formula)"
    ),
}
# A rule is an intent and a weight, and below it the patterns of which one is enough; <name> stands for a part.
_TABLE = r"""
translation 3
    \btranslat(?:e|ion|ing)\b
translation 3
    翻译(?!得|家|官|员|软件|行业|工作)|[译翻]成|译为|[中英日法德韩俄]译[中英日法德韩俄]
translation 3
    \b(?:say|write|put|call|spell)\b.{1,80}\b(?:in|into) <tongue>\b
    \b<tongue> (?:word|words|term|phrase|name) for\b|\bthe <tongue> (?:for|of)\b
    \bhow (?:do|does|would|can|should)\b.{1,30}\bsay\b
translation 3
    \bmeans?\b.{0,20}\bin <tongue>\b|\binto (?:plain )?<tongue>\b
translation 3
    (?:用|在)?<tongue_zh>(?:里|中)?(?:该|应该)?(?:怎么|怎样|如何)?[说讲写读念表]
    的<tongue_zh>(?:意思|翻译|怎么|是什么|是啥|单词)|[变转改换写](?:换|写)?[成为作]<tongue_zh>
summary 3
    \bsummar(?:y|ies|i[sz]e[sd]?|i[sz]ing)\b|\bsum (?:it |this |that )?up\b|\btl;?dr\b|\bgist\b|\bin a nutshell\b
    \b(?:short|shorter|brief|condensed) (?:overview|version)\b|\brecap\b|\b(?:boil|cut|trim)\b.{1,40}\bdown\b
summary 3
    \b(?:main|key|most important) (?:points?|ideas?|messages?)\b|\btakeaways?\b
    \b(?:shorten|condense|abridge|boil down)\b
summary 3
    总结|概括|概述|归纳|摘要|提炼|要点|缩写成|缩短|精简|主要内容|主旨|中心思想|梗概|简要(?:说明|介绍|概)|太长不看
    用[一两三几]句话(?:说|讲)|压缩[成到为]|(?:提取|抓住?|找出|列出).{0,4}重点
    (?:这[篇段封本个]|文章|下面|上面).{0,8}[讲说]了?(?:些)?(?:什么|啥)
role 3
    \bpretend\b|\bact (?:as|like)\b|\brole-?\s?play|\bimagine (?:that )?you(?:'re| are)\b
    \bplay the (?:part|role) of\b|\bas if you were\b|\byou(?:'re| are| will be) (?:the|an?|my) .{1,30}\band I(?:'m| am|'ll be)\b
role 3
    ^(?:from now on,? |now |today )?(?:you are|you're) (?:now )?(?:an?|my|the)\b
    \b(?:speak|talk|answer|reply)(?: to me)? (?:like|as)\b
role 3
    ^be my\b|\bin the (?:voice|style|role|persona) of\b(?=.*\b(?:answer|talk|speak|reply|chat)\b)
role 3
    扮演|假[设如装]你|你(?:现在|来|要|今天)?(?:就)?[当是做](?:一[位名个只]|面试|我的)|角色扮演|充当|你来?当
    的(?:口吻|口气|语气|腔调|身份)
role 2
    从现在(?:开始|起)|^模拟
code 2.5
    (?<![a-z])<programming>(?![a-z])
code 2.5
    \b(?:source code|code|script|bug|debug|compil\w+|refactor|stack trace|segmentation fault|syntax error|unit tests?|command line)\b
code 2.5
    \b[A-Za-z]+(?:Error|Exception)\b|```|\bdef \w+\(|[;{}]\s*$|\b(?:for|while|if) ?\(.*\)|</\w+>|\w+\(\w*\)\s*[;:{]
code 2.5
    代码|编程|函数(?!图像|的图象)|脚本|报错|调试|正则表达式|数据库|编译|命令行|爬虫|循环语句|(?:冒泡|快速|归并)排序
    程序(?!员|性)|进程|端口
code 1.5
    \b(?:function|algorithm|program|app|website|api|variable|array|loop|class method|database|binary search)\b|算法
    变量|数组|接口|网页|查询
code 1
    \b(?:implement|program|code|debug)\b|实现
writing 3
    \b<make>\b.{0,50}\b<piece>\b
writing 3
    (?:写|作|编|讲|拟|创作|起草|来|给(?!定)|想|生成|制作)(?!成|为).{0,16}<piece_zh>|续写|接着写
    (?:写|描写).{0,12}(?:一段|片段)|以.{1,12}为(?:题|主题|背景).{0,4}[写编讲作来]|(?:起|取)[几一]?个?.{0,4}名
writing 1.5
    ^(?:please |can you |could you )?(?:write|compose|draft|invent|make up|rewrite|rephrase|paraphrase|proofread)\b
    ^(?:请|帮我|给我)*(?:写|撰写|编(?!写|译)|创作|改写|重写|润色)
reasoning 3
    \d\s*[-+*/×÷^=]\s*[\d(]|\d\s*=\s*[?？x]|\b\d*[xy]\s*[-+*/=]\s*\d|[\d)]\s*[×÷]
reasoning 2.5
    \b(?:solve (?!an?\b|problems?\b|the (?:problem|issue|crisis))|calculate|compute|prove|evaluate)\b
    \bequations?\b|\bprobability\b|\bin how many ways\b|\bnext (?:number|term)\b
reasoning 2.5
    计算|方程|证明(?!人|书|材料|您|你)|求解|乘以|除以|加上|减去|打[一二三四五六七八九\d.]+折|平均(?:每|数)|一共
    共有|概率|鸡兔|几何|逻辑题|推理
reasoning 2
    ^(?=.*\d\D+\d)(?=.*(?:[?？]|\bhow (?:many|much|fast|long|far|old)\b|多少|几|\bwhat is\b))\D*\d+|\bhow (?:many|much)\b.*\d
    \d[\d.]*%
reasoning 2
    \bif\b.*\b(?:all|every|some|no|takes?)\b.*\?|\btwice as\b|\bhalf as\b|\b(?:are|is) left\b|\bin total\b
    \baltogether\b
reasoning 2
    如果.*(?:所有|每个|那么).*[吗?？]|比.{1,6}[高矮大小重轻快慢多少].*比|(?:谁|哪个)最|各有?(?:多少|几)|每人|还剩
    面积|周长|体积|速度
question 1
    ^\W*(?:what|who|whose|whom|which|where|when|why|how)\b|\b(?:what|who|which|where|when|why|how)\b.*\?
question 1
    ^\W*(?:please )?(?:explain|describe|define|tell me (?:about|what|why|how)|is it true)
    ^(?:is|are|was|were|did|does|can|do) (?!you\b|we\b|i\b)
question 1
    ^(?:please )?(?:name|list|give (?:me )?(?:\d|an?|two|three|some|the)|provide|identify|state)\b
    ^(?:please )?(?:determine|compare|suggest|recommend|classify|outline|discuss|find)\b
    ^请?(?:列[出举]|说出|描述|确定|提供|举出?|指出|比较|识别|给出|推荐|建议|分类)
question 1
    什么|为何|怎么|怎样|如何|谁|哪|多少|多[大长高远久深重]|几(?!乎|次三番)|是否|解释|介绍|讲讲|说明|有没有|区别
chat 2
    \bhow (?:are|is|was|were|'s) (?:you|your|it going|things)\b|\bhow's\b|\bwhat'?s up\b|\bhow do you (?:do|feel)\b
chat 2
    \b(?:do|are|did|have|would|can|will) you (?:like|love|feel|think|want|know me|okay|happy|sad|remember|a robot|human)\b
chat 2
    你(?:平时|平常|一般|最|也|还|真的?|到底)?(?:觉得|喜欢|叫|是谁|几岁|多大|好吗|在吗|累|怎么看|怎么样|开心|记得|爱)|^在吗|最近(?:怎么样|好吗|忙)
    \bwho are you\b|\byour (?:name|favou?rite)\b
"""


def _rules(table: str) -> list[tuple[str, float, re.Pattern[str]]]:
    for name, part in _PARTS.items():
        table = table.replace(f"<{name}>", part)
    rules = []
    for rule in re.split(r"\n(?=\w+ [\d.]+\n)", table.strip()):
        head, *patterns = rule.splitlines()
        name, weight = head.split()
        rules.append((name, float(weight), re.compile("|".join(pattern.strip() for pattern in patterns), re.I | re.S)))
    return rules


_RULES = _rules(_TABLE)
_LONGEST = 1000
"""Characters that the rules look at: what is asked stands at the beginning or at the end of a longer message."""


@dataclass(frozen=True)
class Intent:
    """What a message asks for."""

    name: str
    score: float
    """Sum of the weights of the rules that spoke for it; 0 of a `chat` that nothing spoke for."""
    cues: tuple[str, ...]
    """The parts of the message that they found."""
    scores: dict[str, float] = field(default_factory=dict)
    """The sums of all intents that any rule spoke for, highest first."""


def detect(text: str) -> Intent:
    """The intent of a message in Chinese or English."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}\n{text[-_LONGEST // 2 :]}"
    scores: dict[str, float] = {}
    cues: dict[str, list[str]] = {}
    for name, weight, pattern in _RULES:
        found = pattern.search(text)
        if found:
            scores[name] = scores.get(name, 0.0) + weight
            cues.setdefault(name, []).append(" ".join(found.group().split())[:40])
    order = list(INTENTS)
    ranked = dict(sorted(scores.items(), key=lambda item: (-item[1], order.index(item[0]))))
    best = next(iter(ranked), "chat")
    return Intent(best, ranked.get(best, 0.0), tuple(dict.fromkeys(cues.get(best, ()))), ranked)
