"""What `tools.tokenizer_report --fix` does: each step repairs one file and says what it changed; the old file stays as NAME.bak.

Steps run in order, each on the folder as the step before left it: tokenizer.json, chat template, tokenizer_config.json, weights,
then the ids and sizes in config.json and generation_config.json.
"""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from model.chat_template import STORED_TEMPLATE
from model.token_names import TURN_ENDS
from model.token_text import steps
from model.tokenizer import CONTROL_TOKENS, SPARE_TOKENS, SPECIAL_TOKENS, SPLIT_PATTERN, TAG_TOKENS
from model.weight_files import CHECKSUMS, INDEX_FILE, load_weights, save_weights
from tools.tokenizer_checks import (
    OWN_NAMES,
    REQUIRED,
    TOKENIZER_CLASS,
    growable,
    renders,
    split_name,
)
from tools.tokenizer_folder import (
    EMBEDDING,
    MOST_GAPS,
    OUTPUT,
    ROLES,
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    JsonFile,
    TokenizerFolder,
    keep_copy,
    replace_json,
    replace_text,
    split_patterns,
)

TRAINED_ORDER = [*CONTROL_TOKENS, *TAG_TOKENS]  # the ids that training gives, from the first after the learned tokens


def repair(path: Path) -> list[str]:
    """Repair what can be repaired in a folder; what was changed, one line each. OSError when a file cannot be written."""
    done: list[str] = []
    for step in (repair_tokenizer, repair_template, repair_settings, repair_weights, repair_model_files):
        done += step(TokenizerFolder.read(path))
    return done


# ---------------------------------------------------------------- tokenizer.json


def repair_tokenizer(folder: TokenizerFolder) -> list[str]:
    """Special tokens, their flags, ids and doubles, and (ours) the steps around the merges."""
    if folder.backend is None or folder.tokenizer.values.get("model", {}).get("type") != "BPE" or not folder.vocab:
        return []
    data = copy.deepcopy(folder.tokenizer.values)
    own = folder.own
    done: list[str] = []
    added = _without_doubles(folder, done)
    if own:
        _add_missing(folder, added, done)
    _fill_gaps(folder, added, own, done)
    _set_flags(folder, added, own, done)
    data["added_tokens"] = sorted(added, key=lambda token: int(token["id"]))
    if own:
        _set_pipeline(data, done)
    if not done:
        return []
    try:
        backend = Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{folder.path / TOKENIZER_FILE} cannot be repaired ({error}); nothing was changed") from error
    moved = [token["content"] for token in added if backend.token_to_id(token["content"]) != token["id"]]
    if moved:
        return [f"{TOKENIZER_FILE}: not changed, the ids of {', '.join(moved[:4])} could not be restored"]
    replace_json(folder.path / TOKENIZER_FILE, data)
    return [f"{TOKENIZER_FILE}: {line}" for line in done]


def _without_doubles(folder: TokenizerFolder, done: list[str]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    contents: set[str] = set()
    taken = {i: token for token, i in folder.vocab.items()}
    for token in map(dict, folder.added):
        holder = taken.get(token["id"], token["content"])
        if token["content"] in contents:
            done.append(f"second entry of {token['content']} (id {token['id']}) removed")
        elif holder != token["content"]:
            done.append(f"{token['content']} removed: its id {token['id']} belongs to {holder!r}")
        else:
            kept.append(token)
            contents.add(token["content"])
            taken[token["id"]] = token["content"]
    return kept


def _entry(content: str, token_id: int) -> dict[str, Any]:
    special = content not in TAG_TOKENS
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **switches, "special": special}


def _add_missing(folder: TokenizerFolder, added: list[dict[str, Any]], done: list[str]) -> None:
    """The id that training gave, else a gap, else room in the model (without one: the next id), else a spare token's, else the
    next id, for which `repair_weights` makes the model larger."""
    base = max(folder.vocab.values()) + 1
    present = {token["content"] for token in added}
    rows = folder.model_rows
    for content in [token for token in TRAINED_ORDER if token in (*REQUIRED, *TAG_TOKENS) and token not in present]:
        used = {token["id"] for token in added}
        following = max(used, default=base - 1) + 1
        free = list(islice((i for i in range(base, following) if i not in used), 1))
        trained = base + TRAINED_ORDER.index(content)
        spares = [token for token in added if token["content"] in SPARE_TOKENS]
        if trained not in used and (rows is None or trained < rows):
            choice, where = trained, "its own id"
        elif free:
            choice, where = free[0], "an id that no token had"
        elif rows is None or following < rows or not spares:
            choice, where = following, "the next id"
        else:
            last = max(spares, key=lambda token: int(token["id"]))
            added.remove(last)
            choice, where = last["id"], f"in place of {last['content']}"
        added.append(_entry(content, choice))
        done.append(f"{content} added as {choice}, {where}")


def _fill_gaps(folder: TokenizerFolder, added: list[dict[str, Any]], own: bool, done: list[str]) -> None:
    """The tokenizers library numbers added tokens one after the other: a gap would move all that follow."""
    used = {token["id"] for token in added} | set(folder.vocab.values())
    names = {token["content"] for token in added}
    spares = [token for token in SPARE_TOKENS if token not in names] if own else []
    # Not folder.gaps: tokens that were added just now have filled some of them.
    gaps = list(islice((i for i in range(len(folder.vocab), max(used) + 1) if i not in used), MOST_GAPS))
    for gap in gaps if len(gaps) < MOST_GAPS else []:
        content = spares.pop(0) if spares else f"<|unused_{gap}|>"
        added.append(_entry(content, gap))
        done.append(f"{content} added as {gap}, where no token was")


def _set_flags(folder: TokenizerFolder, added: list[dict[str, Any]], own: bool, done: list[str]) -> None:
    named = set(folder.named.values())
    for token in added:
        content = token["content"]
        wanted = dict(_entry(content, token["id"])) if own and content in SPECIAL_TOKENS else {}
        if not own and content in named:
            wanted = {"special": True}
        wrong = [name for name, value in wanted.items() if token.get(name, False) != value]
        if wrong:
            token.update(wanted)
            done.append(f"{content}: {', '.join(f'{name}={wanted[name]}' for name in wrong)}")


def _set_pipeline(data: dict[str, Any], done: list[str]) -> None:
    if data.get("normalizer") is not None:
        data["normalizer"] = None
        done.append("normaliser removed")
    if not any(step.get("type") == "ByteLevel" for step in steps(data.get("pre_tokenizer"))):
        before = split_name(data) if split_patterns(data) else "nothing"
        split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False, prefix=False)]}
        done.append(f"our split pattern and the byte-level step written (before: {before})")
    if not any(step.get("type") == "ByteLevel" for step in steps(data.get("decoder"))):
        data["decoder"] = _byte_level(use_regex=True, prefix=True)
        done.append("byte-level decoder written")


def _byte_level(use_regex: bool, prefix: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


# ---------------------------------------------------------------- chat template and tokenizer_config.json


def repair_template(folder: TokenizerFolder) -> list[str]:
    """A missing or damaged chat_template.jinja: from tokenizer_config.json where that copy works, else (ours) ours."""
    if folder.backend is None:
        return []
    stored, inner = folder.template, folder.settings_template
    works = stored is not None and not renders(folder, stored)
    if works or (stored is None and inner is not None and not folder.own):
        return []
    if inner is not None and not renders(folder, inner):
        template, source = inner, SETTINGS_FILE
    elif folder.own:
        template, source = STORED_TEMPLATE, "ours"
    else:
        return []
    replace_text(folder.path / TEMPLATE_FILE, template)
    return [f"{TEMPLATE_FILE}: written ({source})"]


def repair_settings(folder: TokenizerFolder) -> list[str]:
    """tokenizer_config.json: a missing or damaged one, names of tokens that do not exist, the template's copy."""
    if folder.backend is None:
        return []
    data = dict(folder.settings.values)
    before = json.dumps(data, sort_keys=True)
    wanted = _names(folder)
    done = []
    if folder.settings.data is None:
        data = {
            "tokenizer_class": TOKENIZER_CLASS,
            **dict.fromkeys(f"{role}_token" for role in ROLES),
            "clean_up_tokenization_spaces": False,
        }
        done.append("written anew")
    for role, token in wanted.items():
        if folder.named.get(role) != token:
            data[f"{role}_token"] = token
            done.append(f"{role}_token is {token}")
    if folder.own and data.get("tokenizer_class") != TOKENIZER_CLASS:
        data["tokenizer_class"] = TOKENIZER_CLASS
        done.append(f"tokenizer_class is {TOKENIZER_CLASS}")
    inner = folder.settings_template
    if folder.template is not None and inner != folder.template and (inner is not None or folder.settings.data is None):
        data["chat_template"] = folder.template
        done.append(f"chat_template is that of {TEMPLATE_FILE}")
    if json.dumps(data, sort_keys=True) == before and folder.settings.data is not None:
        return []
    replace_json(folder.path / SETTINGS_FILE, data)
    return [f"{SETTINGS_FILE}: {line}" for line in done]


def _names(folder: TokenizerFolder) -> dict[str, str | None]:
    """The names that tokenizer_config.json should say. An imported tokenizer's own are kept where the tokens exist."""
    if folder.own:
        return dict(OWN_NAMES)
    tokens = {i: token for token, i in folder.ids.items()}
    added = {token["content"] for token in folder.added}  # a config.json may carry default ids, which are letters elsewhere
    names: dict[str, str | None] = {}
    for role in ROLES:
        name = folder.named.get(role)
        if name in folder.ids or (name is None and (folder.settings.data is not None or role == "unk")):
            continue
        stated = folder.config.values.get(f"{role}_token_id")
        stated = stated[0] if isinstance(stated, list) and stated else stated
        token = tokens.get(stated) if isinstance(stated, int) else None
        names[role] = token if token in added else None
    if "eos" in names and names["eos"] is None:
        names["eos"] = next((token for token in TURN_ENDS if token in folder.ids), None)
    return names


# ---------------------------------------------------------------- weights and the model's JSON files


def repair_weights(folder: TokenizerFolder) -> list[str]:
    """New rows, the mean of the others, for special tokens beyond the embedding (and output) matrix."""
    rows = folder.rows.get(EMBEDDING)
    if rows is None or folder.size <= rows[1] or not growable(folder):
        return []
    if OUTPUT in folder.rows and folder.rows[OUTPUT][1] != rows[1]:
        return []
    extra = folder.size - rows[1]
    grown = 0
    checksums: dict[str, int] = {}
    for file in sorted({file for file, _ in folder.rows.values()}):
        tensors = load_weights(file)
        for name in [name for name, (holder, _) in folder.rows.items() if holder == file]:
            matrix = tensors[name]
            mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
            tensors[name] = torch.cat([matrix, mean.expand(extra, -1)])
            grown += extra * matrix.shape[1] * matrix.element_size()
        keep_copy(file)
        checksums.update(save_weights(tensors, file))
    index = JsonFile.read(folder.path / INDEX_FILE)
    metadata = index.values.get("metadata")
    if isinstance(metadata, dict):
        changed = dict(metadata)
        if isinstance(metadata.get("total_size"), int):
            changed["total_size"] += grown
        if isinstance(metadata.get(CHECKSUMS), dict):
            changed[CHECKSUMS] = {**metadata[CHECKSUMS], **checksums}
        replace_json(index.path, {**index.values, "metadata": changed})
    return [f"weights: {extra} rows added for new tokens (the mean of the others); fine-tune before relying on them"]


def repair_model_files(folder: TokenizerFolder) -> list[str]:
    """vocab_size from the weights; eos, pad and bos ids from the tokenizer."""
    if folder.backend is None:
        return []
    done = []
    for file in (folder.config, folder.generation):
        if file.data is None and not (file is folder.generation and file.problem):
            continue
        data = dict(file.values)
        changes = _id_changes(folder, file)
        if file is folder.config and EMBEDDING in folder.rows and data.get("vocab_size") != folder.rows[EMBEDDING][1]:
            changes["vocab_size"] = folder.rows[EMBEDDING][1]
        if changes:
            replace_json(file.path, {**data, **changes})
            done += [f"{file.path.name}: {name} {data.get(name)} -> {value}" for name, value in changes.items()]
    return done


def _id_changes(folder: TokenizerFolder, file: JsonFile) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    limit = max(folder.size, folder.model_rows or 0)
    for role in ("eos", "pad", "bos"):
        key = f"{role}_token_id"
        value = file.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        name = OWN_NAMES.get(role) if folder.own else folder.named.get(role)
        right = folder.ids.get(name) if name is not None else None
        inside = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < limit]
        if folder.own:
            good = right in ids if right is not None and (ids or role == "eos") else not ids
            ordinary = role == "eos" and not set(ids) <= {token["id"] for token in folder.added}
            if not good or ordinary or inside != ids:
                both = [right, folder.ids[OWN_NAMES["pad"]]]
                changes[key] = both if role == "eos" and file is folder.generation else right
        elif inside != ids:
            changes[key] = inside if isinstance(value, list) and inside else right
        elif file.problem and right is not None:
            changes[key] = right
    return changes
