"""Into which folder a file is sorted: by its type, suffix, month or tag."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from inference.file_paths import suffix

# Each type: (Chinese, English) name of its folder, and its suffixes.
TYPES: tuple[tuple[tuple[str, str], str], ...] = (
    (("图片", "Pictures"), "jpg jpeg png gif bmp webp heic heif tif tiff svg ico avif raw cr2 nef psd"),
    (("视频", "Videos"), "mp4 mkv mov avi wmv flv webm m4v mpg mpeg ts rmvb 3gp"),
    (("音频", "Audio"), "mp3 wav flac aac ogg m4a wma opus ape aiff mid midi"),
    (("文档", "Documents"), "txt md pdf doc docx odt rtf wps epub mobi tex log org rst ppt pptx odp key pages"),
    (("表格", "Tables"), "xls xlsx csv tsv ods et numbers"),
    (("压缩包", "Archives"), "zip rar 7z tar gz bz2 xz zst tgz iso dmg"),
    (
        ("代码", "Code"),
        "py js ts jsx tsx java c h cpp hpp cc go rs rb php sh bat ps1 html css json yaml yml toml xml sql ipynb r lua",
    ),
    (("程序", "Programs"), "exe msi apk deb rpm appimage app jar"),
    (("字体", "Fonts"), "ttf otf woff woff2"),
)
OTHER = ("其他", "Other")
# How people call them in a sentence.
SPOKEN: dict[str, int] = {
    word: index
    for index, words in enumerate(
        (
            "图片 照片 图像 截图 picture image photo",
            "视频 影片 电影 video movie",
            "音频 音乐 歌曲 录音 audio music song",
            "文档 document",
            "表格 电子表格 table spreadsheet",
            "压缩包 压缩文件 archive",
            "代码 源代码 code",
            "程序 安装包 program installer",
            "字体 font",
        )
    )
    for word in words.split()
}
_TYPE_OF = {f".{ending}": index for index, (_, endings) in reversed(list(enumerate(TYPES))) for ending in endings.split()}
_PASSING = ("tmp", "temp", "bak", "old", "swp", "part", "crdownload", "cache", "ini", "cfg", "conf", "dat", "bin")


def group_name(by: str, name: str, modified: float, tags: Sequence[str], language: str) -> str:
    """The folder for a file, "" when it stays where it is (no suffix, no tag). modified: seconds since 1970."""
    index = 0 if language == "zh" else 1
    if by == "type":
        found = _TYPE_OF.get(suffix(name))
        return OTHER[index] if found is None else TYPES[found][0][index]
    if by == "suffix":
        return suffix(name).lstrip(".")
    if by == "month":
        return datetime.fromtimestamp(modified).strftime("%Y-%m")
    return tags[0] if tags else ""


def is_suffix(word: str) -> bool:
    """Whether a word without its dot is known as a suffix."""
    return f".{word.lower()}" in _TYPE_OF or word.lower() in _PASSING


def suffixes_of(word: str) -> list[str]:
    """The suffixes that a word for a type stands for (pictures, 图片); [] when it is none."""
    word = word.lower()
    index = SPOKEN.get(word, SPOKEN.get(word.removesuffix("s")))
    return [] if index is None else [f".{ending}" for ending in TYPES[index][1].split()]
