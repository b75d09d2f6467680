"""The checks of a tokenizer's folder: each looks at one thing and says ok, WARN or FAIL, with the remedy."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from model.chat_template import STORED_TEMPLATE, render_spans
from model.token_text import steps
from model.tokenizer import BYTES, CONTROL_TOKENS, DOCUMENT_END, IM_END, IM_START, SPECIAL_TOKENS, SPLIT_PATTERN, TAG_TOKENS
from tools.tokenizer_folder import (
    EMBEDDING,
    FAIL,
    MAP_FILE,
    MOST_GAPS,
    OK,
    OUTPUT,
    ROLES,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    WARN,
    Check,
    JsonFile,
    TokenizerFolder,
    split_patterns,
    token_name,
)
from tools.tokenizer_texts import OUR_READER, Failure, missing_bytes, unreachable

OWN_NAMES = {"eos": IM_END, "pad": DOCUMENT_END}
REQUIRED = (DOCUMENT_END, IM_START, IM_END)
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
RETRAIN = "train another: `python -m train.train_tokenizer`, then the model"
AGAIN = "copy tokenizer.json from where this folder came from (a checkpoint of the same run has the same one)"
FIX = "--fix repairs it"
SHOWN = 6
FEW_BYTES = 32
UNREACHABLE_SHARE = 0.01  # a few are normal in any trained BPE

_TEMPLATE_TOKEN = re.compile(r"<\|[^|\s<>{}'\"]{1,40}\|>")
_GPT2_SPLIT, _DIGITS = "GPT-2's", "single digits"


def all_checks(folder: TokenizerFolder, tried: int, failures: list[Failure]) -> list[Check]:
    """Every check of the folder; `tried` and `failures` come from `round_trip`."""
    if folder.backend is None:
        problem = folder.tokenizer.problem or "is missing"
        return [Check("tokenizer.json", FAIL, problem, f"{AGAIN}; or {RETRAIN}"), *settings_checks(folder), *model_checks(folder)]
    return [
        *vocabulary_checks(folder),
        round_trip_check(folder, tried, failures),
        *special_checks(folder),
        *pipeline_checks(folder),
        *template_checks(folder),
        *settings_checks(folder),
        *model_checks(folder),
        *id_checks(folder),
    ]


def listed(items: Any) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more


def vocabulary_checks(folder: TokenizerFolder) -> list[Check]:
    """Model kind, ids without gaps and doubles, all bytes, tokens that no text produces, loading in this project."""
    data = folder.tokenizer.values
    kind = data.get("model", {}).get("type")
    origin = "made by train_tokenizer" if folder.own else "imported: its own names of special tokens are respected"
    found = [Check("vocabulary", OK, f"{folder.size:,} ids, {len(folder.added)} of them special or added; {origin}")]
    if kind != "BPE":
        return [*found, Check("model kind", FAIL, f"{kind}, only BPE can be used here", "use a model with a BPE tokenizer")]
    holders = Counter(folder.ids.values())
    double = [i for i, count in holders.items() if count > 1]
    if double:
        learned = {i for i, count in Counter(folder.vocab.values()).items() if count > 1}
        names = [f"{i}: {' = '.join(t for t, j in folder.ids.items() if j == i)}" for i in sorted(double)]
        fixable = not learned
        found.append(Check("double ids", FAIL, listed(names), FIX if fixable else f"{AGAIN}; or {RETRAIN}", fixable))
    gaps = folder.gaps
    if gaps:
        repairable = gaps[0] >= len(folder.vocab) and len(gaps) < MOST_GAPS
        status = FAIL if shifted(folder) else WARN
        remedy = FIX if repairable else f"harmless if the model was trained so; else {AGAIN}"
        found.append(Check("gaps", status, f"no token has id {listed(gaps)}", remedy, repairable))
    if not double and not gaps:
        found.append(Check("ids", OK, "no gap, no id twice"))
    found.append(_bytes_check(folder, missing_bytes(folder)))
    lost = unreachable(folder)
    names = [repr(token) for token, i in folder.vocab.items() if i in set(lost[:SHOWN])]
    detail = f"{len(lost):,} learned tokens that no text can produce" + (f": {listed(names)}" if lost else "")
    many = len(lost) > UNREACHABLE_SHARE * max(len(folder.vocab), 1)
    found.append(Check("merges", WARN if many else OK, detail, f"merges are missing or damaged: {AGAIN}; or {RETRAIN}" if many else ""))
    if folder.loaded is None:
        found.append(Check("loads here", FAIL, folder.load_problem, "see the other lines"))
    return found


def shifted(folder: TokenizerFolder) -> list[str]:
    """Added tokens that the tokenizers library numbers differently from the file: the model would see wrong ids."""
    assert folder.backend is not None
    pairs = ((t["content"], t["id"], folder.backend.token_to_id(t["content"])) for t in folder.added)
    return [f"{content} is {actual}, the file says {stated}" for content, stated, actual in pairs if actual != stated]


def _bytes_check(folder: TokenizerFolder, missing: list[int]) -> Check:
    """Every byte of text needs a token, or some characters cannot be written. Some published tokenizers lack a few."""
    if not missing:
        return Check("bytes", OK, "every byte that text can contain has a token")
    detail = (
        f"no token for {len(missing)} of {BYTES} bytes ({listed(f'0x{value:02x}' for value in missing)}): characters with them are lost"
    )
    if folder.own or len(missing) > FEW_BYTES:
        return Check("bytes", FAIL, detail, f"{AGAIN}; or {RETRAIN}")
    return Check("bytes", WARN, detail, "as imported; only rare characters and control characters need them")


def round_trip_check(folder: TokenizerFolder, tried: int, failures: list[Failure]) -> Check:
    """Text -> ids -> text. An imported normaliser or SentencePiece's spaces may change texts by design."""
    if not failures:
        return Check("round trip", OK, f"{tried} texts of all kinds come back unchanged")
    data = folder.tokenizer.values
    names = {failure.sample for failure in failures}
    detail = f"{len(names)} of {tried} texts come back changed; {failures[0].line()}"
    if not folder.own and (data.get("normalizer") is not None or not folder.byte_level):
        return Check("round trip", WARN, detail, "as imported: its normaliser changes text, in training data too")
    if not folder.own and 0 < len(missing_bytes(folder)) <= FEW_BYTES:
        return Check("round trip", WARN, detail, "as imported: it has no tokens for some bytes, see above")
    if all(failure.reader == OUR_READER for failure in failures):  # the tokenizer itself is sound: a file beside it misleads
        return Check("round trip", FAIL, detail, "see the other lines")
    fixable = folder.own and (not _byte_level_pipeline(folder) or data.get("normalizer") is not None or _eats_spaces(folder) != [])
    return Check("round trip", FAIL, detail, FIX if fixable else f"{AGAIN}; or {RETRAIN}", fixable)


def _missing_own(folder: TokenizerFolder) -> list[str]:
    present = {token["content"] for token in folder.added}
    return [token for token in SPECIAL_TOKENS if token in (*REQUIRED, *TAG_TOKENS) and token not in present] if folder.own else []


def _eats_spaces(folder: TokenizerFolder) -> list[str]:
    """Own special tokens with a switch that swallows or changes the text around them."""
    switches = ("single_word", "lstrip", "rstrip", "normalized")
    return [t["content"] for t in folder.added if t["content"] in SPECIAL_TOKENS and any(t.get(name) for name in switches)]


def special_checks(folder: TokenizerFolder) -> list[Check]:
    """Special tokens: present, one id each, ordinary characters in plain text, right flags, no doubles."""
    assert folder.backend is not None
    found: list[Check] = []
    contents = Counter(token["content"] for token in folder.added)
    missing = _missing_own(folder)
    if missing:
        status = FAIL if set(missing) & set(REQUIRED) or shifted(folder) else WARN
        found.append(Check("special tokens", status, f"missing: {listed(missing)}", f"--fix adds {'them' if missing[1:] else 'it'}", True))
    double = [token for token, count in contents.items() if count > 1]
    if double:
        found.append(Check("double tokens", FAIL, f"listed more than once: {listed(double)}", FIX, True))
    moved = shifted(folder)
    if moved:
        found.append(Check("moved ids", FAIL, listed(moved) + ": the model sees other tokens than it learned", FIX, True))
    wanted = [*SPECIAL_TOKENS] if folder.own else sorted(set(folder.named.values()))
    present = [token for token in wanted if token in contents]
    split = [t for t in present if folder.backend.encode(t, add_special_tokens=False).ids != [folder.backend.token_to_id(t)]]
    if split:
        found.append(Check("atomic", FAIL, f"not one id: {listed(split)}", FIX, True))
    if folder.loaded is not None:
        loaded = folder.loaded
        leaked = [t for t in present if t in folder.ids and folder.ids[t] in loaded.encode(t)]
        if leaked:
            status = FAIL if folder.own else WARN
            found.append(Check("plain text", status, f"written in a text, {listed(leaked)} become the special token", RETRAIN))
    flags = wrong_flags(folder)
    if flags:
        found.append(Check("flags", FAIL if folder.own else WARN, listed(flags), FIX, True))
    spaces = _eats_spaces(folder) if folder.own else []
    if spaces:
        found.append(Check("flags", FAIL, f"swallow or change the text around them: {listed(spaces)}", FIX, True))
    if not found:
        what = f"all {len(present)} there" if folder.own else f"{listed(present)} there" if present else "none named"
        found.append(Check("special tokens", OK, f"{what}, one id each, plain characters when a text contains them"))
    return found


def wrong_flags(folder: TokenizerFolder) -> list[str]:
    """Own: control tokens must be special (dropped from shown text), tags must not. Imported: the named ones must be special."""
    if not folder.own:
        named = set(folder.named.values())
        return [f"{t['content']} is not special" for t in folder.added if t["content"] in named and not t.get("special")]
    wrong = [f"{t['content']} is not special" for t in folder.added if t["content"] in CONTROL_TOKENS and not t.get("special")]
    return wrong + [f"{t['content']} is special" for t in folder.added if t["content"] in TAG_TOKENS and t.get("special")]


def _byte_level_pipeline(folder: TokenizerFolder) -> bool:
    data = folder.tokenizer.values
    return all(any(step.get("type") == "ByteLevel" for step in steps(data.get(part))) for part in ("pre_tokenizer", "decoder"))


def pipeline_checks(folder: TokenizerFolder) -> list[Check]:
    """Normaliser, split pattern, decoder."""
    data = folder.tokenizer.values
    found = []
    normaliser = [str(step.get("type")) for step in steps(data.get("normalizer"))]
    if not normaliser:
        found.append(Check("normaliser", OK, "none: text is kept as it is"))
    elif folder.own:
        found.append(Check("normaliser", FAIL, f"{listed(normaliser)}: ours have none, texts are changed", FIX, True))
    elif set(normaliser) <= {"Prepend", "Replace"}:
        found.append(Check("normaliser", OK, f"{listed(normaliser)}: spaces as SentencePiece writes them"))
    else:
        remedy = "keep it as it is; text that it changes gets other ids in a GGUF export"
        found.append(Check("normaliser", WARN, f"{listed(normaliser)}, as imported: some texts are changed", remedy))
    known = split_name(data)
    if folder.own and not _byte_level_pipeline(folder):
        found.append(Check("split pattern", FAIL, f"{known}; the byte-level step or decoder is missing", FIX, True))
    elif folder.own and SPLIT_PATTERN not in split_patterns(data):
        found.append(
            Check("split pattern", WARN, f"{known}, ours cuts otherwise", f"an export to GGUF may cut texts differently; {RETRAIN}")
        )
    else:
        found.append(Check("split pattern", OK, known))
    return found


def split_name(data: dict[str, Any]) -> str:
    """The way of cutting text, in words."""
    patterns, kinds = split_patterns(data), steps(data.get("pre_tokenizer"))
    types = [str(step.get("type")) for step in kinds]
    if SPLIT_PATTERN in patterns:
        return "Qwen2's, ours"
    if any(r"\p{N}{1,3}" in pattern for pattern in patterns):
        return "Llama 3's (digits in threes)"
    gpt2 = any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in kinds)
    if gpt2 and not patterns:
        return f"{_GPT2_SPLIT}, {_DIGITS}" if "Digits" in types else _GPT2_SPLIT
    if "Metaspace" in types or any(step.get("type") == "Prepend" for step in steps(data.get("normalizer"))):
        return "SentencePiece's (spaces only)"
    return f"not one we know: {listed(patterns or types)}" if types else "none: text is not cut before merging"


EXAMPLE = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


def renders(folder: TokenizerFolder, template: str) -> str:
    """A short conversation through a template; "" when it works, else what went wrong."""
    try:
        if folder.loaded is not None and folder.loaded.chat_template == template:
            text = folder.loaded.render(EXAMPLE).text
        else:
            text = "".join(piece for piece, _ in render_spans(EXAMPLE, template=template))
    except ValueError as error:
        return str(error)
    return "" if "hello" in text and "good day" in text else "it leaves out what was said"


def template_checks(folder: TokenizerFolder) -> list[Check]:
    """The chat template: there, renders, the same in both files, writes only tokens that exist."""
    stored, inner = folder.template, folder.settings_template
    template = stored if stored is not None else inner
    if template is None:
        if folder.own:
            return [Check("chat template", FAIL, f"{TEMPLATE_FILE} is missing: other programs cannot chat with it", FIX, True)]
        return [Check("chat template", WARN, "none (a base model?)", f"put the model's own {TEMPLATE_FILE} there")]
    problem = renders(folder, template)
    if problem:
        other = inner is not None and inner != template and not renders(folder, inner)
        fixable = folder.own or other
        return [Check("chat template", FAIL, problem, FIX if fixable else "take the template from where the model came from", fixable)]
    found = []
    if stored is None and folder.own:
        found.append(Check("chat template", WARN, f"only in {SETTINGS_FILE}, {TEMPLATE_FILE} is missing", FIX, True))
    elif stored is not None and inner is not None and inner != stored:
        detail = f"{TEMPLATE_FILE} and {SETTINGS_FILE} differ: programs disagree on how to talk to the model"
        found.append(Check("chat template", WARN, detail, f"--fix takes {TEMPLATE_FILE}", True))
    if folder.own and template != STORED_TEMPLATE:
        found.append(
            Check("chat template", WARN, "not the one that training uses: an older version, or edited", "retrain SFT, or keep it so")
        )
    unknown = sorted(set(_TEMPLATE_TOKEN.findall(template)) - set(folder.ids))
    if unknown:
        detail = f"writes {listed(unknown)}, which {'are' if unknown[1:] else 'is'} no token"
        found.append(Check("template tokens", WARN, detail, "these become many ordinary tokens; is it the template of this tokenizer?"))
    return found or [Check("chat template", OK, "renders; " + ("ours" if folder.own else "its own"))]


def settings_checks(folder: TokenizerFolder) -> list[Check]:
    """tokenizer_config.json: there, names tokens that exist, ours where the tokenizer is ours."""
    settings = folder.settings
    if settings.data is None:
        fixable = folder.backend is not None
        status = FAIL if settings.problem or folder.own else WARN
        return [Check(SETTINGS_FILE, status, settings.problem or "is missing", FIX if fixable else AGAIN, fixable)]
    found = []
    names, ids = folder.named, folder.ids
    unknown = [f"{role}_token {names[role]!r}" for role in ROLES if role in names and names[role] not in ids]
    if unknown and ids:
        found.append(Check(SETTINGS_FILE, FAIL, f"names no token of the vocabulary: {listed(unknown)}", FIX, True))
    if folder.own:
        wrong = [f"{role}_token is {names.get(role)!r}, not {token!r}" for role, token in OWN_NAMES.items() if names.get(role) != token]
        if wrong:
            found.append(Check(SETTINGS_FILE, FAIL, f"{listed(wrong)}: generation would not stop where it should", FIX, True))
        kind = settings.values.get("tokenizer_class")
        if kind != TOKENIZER_CLASS:
            found.append(Check(SETTINGS_FILE, WARN, f"tokenizer_class is {kind!r}, not {TOKENIZER_CLASS!r}", FIX, True))
    elif "eos" not in names:
        found.append(
            Check(SETTINGS_FILE, WARN, "names no eos_token: generation stops only at the limit", "write the token that ends a turn")
        )
    found += _map_check(folder.special_map, names)
    said = ", ".join(f"{role} {name}" for role, name in names.items())
    return found or [Check(SETTINGS_FILE, OK, said)]


def _map_check(special_map: JsonFile, names: dict[str, str]) -> list[Check]:
    if special_map.problem:
        return [Check(MAP_FILE, WARN, special_map.problem, f"delete it: {SETTINGS_FILE} says the same")]
    told = {role: token_name(special_map.values.get(f"{role}_token")) for role in ROLES}
    other = [f"{role} {told[role]!r} / {names[role]!r}" for role in names if told[role] is not None and told[role] != names[role]]
    return [Check(MAP_FILE, WARN, f"differs from {SETTINGS_FILE}: {listed(other)}", f"delete {MAP_FILE}")] if other else []


def growable(folder: TokenizerFolder) -> bool:
    """Whether only special tokens lie beyond the model's rows, so that new rows are all that is missing."""
    rows = folder.rows.get(EMBEDDING)
    added = {token["id"] for token in folder.added}
    return rows is not None and folder.size - rows[1] <= len(added) and set(range(rows[1], folder.size)) <= added


def model_checks(folder: TokenizerFolder) -> list[Check]:
    """The model's vocabulary: config.json, the rows of the weights and the tokenizer must fit."""
    config = folder.config
    if config.problem:
        return [Check("config.json", FAIL, config.problem, "copy it from a checkpoint of the same run")]
    found = []
    if folder.weights_problem:
        found.append(Check("weights", FAIL, folder.weights_problem, "copy them again, or continue from a checkpoint with --resume"))
    rows = folder.rows[EMBEDDING][1] if EMBEDDING in folder.rows else None
    stated = config.values.get("vocab_size")
    if config.data is not None and rows is not None and stated != rows:
        found.append(Check("embedding", FAIL, f"config.json says vocab_size {stated}, the weights have {rows:,} rows", FIX, True))
    elif config.data is not None and not isinstance(stated, int):
        found.append(
            Check("embedding", FAIL, f"config.json: vocab_size is {stated!r}", "write the number of rows of the model's embedding")
        )
    if rows is not None and OUTPUT in folder.rows and folder.rows[OUTPUT][1] != rows:
        detail = f"{rows:,} rows, but the output matrix has {folder.rows[OUTPUT][1]:,}"
        found.append(Check("embedding", FAIL, detail, "the weights are damaged: take them from a checkpoint"))
    known = folder.model_rows
    if known is None or not folder.ids:
        return found
    if folder.size > known:
        detail = f"the tokenizer has ids up to {folder.size - 1:,}, the model knows {known:,}"
        fixable = growable(folder)
        remedy = f"--fix adds {folder.size - known} rows, then fine-tune" if fixable else "another model's tokenizer? take the model's own"
        found.append(Check("model vocabulary", FAIL, detail, remedy, fixable))
    elif not found:
        spare = f", {known - folder.size:,} rows without a token" if known > folder.size else ", the tokenizer's size"
        found.append(Check("model vocabulary", OK, f"{known:,}{spare}"))
    return found


def id_checks(folder: TokenizerFolder) -> list[Check]:
    """eos, pad and bos ids in config.json and generation_config.json against the tokenizer."""
    found = []
    files = [file for file in (folder.config, folder.generation) if file.data is not None]
    if folder.generation.problem:
        found.append(Check(folder.generation.path.name, FAIL, folder.generation.problem, FIX, True))
    for file in files:
        for role in ("eos", "pad", "bos"):
            found += _role_check(folder, file, role)
    if files and not found:
        found.append(Check("model ids", OK, f"eos, pad and bos of {' and '.join(file.path.name for file in files)} fit the tokenizer"))
    return found


def _role_check(folder: TokenizerFolder, file: JsonFile, role: str) -> list[Check]:
    value = file.values.get(f"{role}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    name = folder.named.get(role) if not folder.own else OWN_NAMES.get(role)
    right = folder.ids.get(name) if name is not None else None
    label = f"{file.path.name}: {role}_token_id {value}"
    limit = max(folder.size, folder.model_rows or 0)
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < limit for i in ids):
        return [Check("model ids", FAIL, f"{label} is outside the vocabulary of {limit:,}", FIX, True)]
    added = {token["id"] for token in folder.added}
    ordinary = [i for i in ids if folder.own and role == "eos" and i not in added]
    if ordinary:
        return [Check("model ids", FAIL, f"{label}: {listed(ordinary)} is ordinary text, not a special token", FIX, True)]
    if right is not None and ids and right not in ids:
        detail = f"{label}, the tokenizer's is {right} ({name})"
        if folder.own:
            return [Check("model ids", FAIL if role == "eos" else WARN, detail, FIX, True)]
        return [Check("model ids", WARN, detail, "as imported: kept")]
    if folder.own and role == "bos" and ids:
        return [Check("model ids", WARN, f"{label}, the tokenizer has none", FIX, True)]
    if folder.own and role == "eos" and not ids:
        return [Check("model ids", WARN, f"{label}: generation would not stop", FIX, True)]
    return []
