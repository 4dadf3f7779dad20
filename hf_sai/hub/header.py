"""The YAML header of a card, edited by top-level key: every byte that is not of an edited value stays as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results


LARGEST = 2**19  # characters: a header of that size takes seconds to read; the largest known ones have 250,000
MODEL_INDEX = "model-index"
_EMPTY_BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))(---[ \t]*(?:\r\n|\n|$))")
_LOOKS_LIKE_A_BLOCK = re.compile(r"^\s*---[ \t]*(?:\r\n|\r|\n|$)")
_REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\r\n]*)?(?=\r|\n|$)")
_DASH = re.compile(r"[ \t]*-[ \t]+$")
_NULL = "tag:yaml.org,2002:null"
_MAPPING, _SEQUENCE, _SCALAR = yaml.MappingNode, yaml.SequenceNode, yaml.ScalarNode


class HeaderError(ValueError):
    """The header can't be read, or this edit would change more than it should; nothing was changed."""


class Parts(NamedTuple):
    """A card in four parts, which joined are the card."""

    before: str
    source: str
    after: str
    text: str


def newline_of(text: str) -> str:
    """The line ending that a text uses first; `"\\n"` where it has one line only."""
    found = re.search(r"\r\n|\r|\n", text)
    return found[0] if found else "\n"


def split_card(content: str) -> Parts:
    """Marks, header and text of a card, as the Hub reads it; without a header, `source` and `after` are empty."""
    mark = "\ufeff" if content.startswith("\ufeff") else ""
    content = content[len(mark) :]
    found = _EMPTY_BLOCK.search(content)  # first: the other one would look for an end further down
    if found:
        return Parts(mark + found[1], "", found[2], content[found.end() :])
    found = REGEX_YAML_BLOCK.search(content)
    if found:
        return Parts(mark + found[1], found[2], found[3], content[found.end() :])
    return Parts(mark, "", "", content)


def header_of(parts: Parts) -> Header:
    """The header of a card, for edits; an error too where the card begins as a header does and the Hub sees none."""
    if not parts.after and _LOOKS_LIKE_A_BLOCK.search(parts.text):
        raise HeaderError("it must end with a line --- as it begins with one, without blanks behind the first")
    return Header(parts.source, newline_of("".join(parts)))


def join_card(parts: Parts, source: str) -> str:
    """The card with another header; one that had none gets its marks too."""
    line = newline_of("".join(parts))
    if not source or (parts.source and parts.after):
        return f"{parts.before}{source}{parts.after}{parts.text}"
    if parts.after:  # an empty one: its end stands right after its beginning, or after a blank line
        after = parts.after if parts.after.startswith(("\r", "\n")) else line + parts.after
        return f"{parts.before}{source}{after}{parts.text}"
    return f"{parts.before}---{line}{source}{line}---{line}{parts.text}"


class Header:
    """
    The source of a header (YAML, without the lines `---`), and edits of it. Each edit is read back, and undone where
    anything else changed. A source that is no mapping of names in block style, or has a name twice, is a
    `HeaderError`.
    """

    def __init__(self, source: str, newline: str) -> None:
        self.source, self.newline = source, newline
        if len(source) > LARGEST:
            raise HeaderError(f"a header may have {LARGEST:,} characters, but it has {len(source):,}")
        self.data = _read(source)
        keys = [key.value for key, _ in self._entries()]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise HeaderError(f"a name may stand in it once, but {twice[0]} stands there more often")

    def append(self, key: str, value: Any) -> None:
        """A key that is not there, at the end."""
        entries = self._entries()
        lines = _dump({key: value})
        indent = " " * (entries[0][0].start_mark.column if entries else 0)
        added = self.newline.join(indent + line for line in lines)
        source = self.source + (self.newline if self.source else "") + added
        self._commit(source, {**self.data, key: value})

    def extend(self, key: str, items: Iterable[str]) -> None:
        """Adds what a list lacks at its end; one word becomes a list, a key that is not there is made."""
        there = self.data.get(key)
        old = [] if there is None else there if isinstance(there, list) else [there]
        new = [each for each in dict.fromkeys(items) if each not in old]
        if not new:
            return
        if key not in self.data:
            self.append(key, new)
            return
        node = self._value(key)
        wanted = {**self.data, key: [*old, *new]}
        inline = ", ".join(_inline(each) for each in new)
        start, end = node.start_mark.index, node.end_mark.index
        if isinstance(node, _SEQUENCE) and node.value and not node.flow_style:
            self._commit(self._after_last_item(node, [_dump([each]) for each in new]), wanted)
        elif isinstance(node, _SEQUENCE) and node.value:
            last = node.value[-1].end_mark.index
            self._commit(f"{self.source[:last]}, {inline}{self.source[last:]}", wanted)
        elif isinstance(node, _SEQUENCE) or node.tag == _NULL:  # [], null, or nothing at all
            space = " " if start == end else ""
            self._commit(f"{self.source[:start]}{space}[{inline}]{self.source[end:]}", wanted)
        else:
            self._commit(f"{self.source[:start]}[{self.source[start:end]}, {inline}]{self.source[end:]}", wanted)

    def drop(self, key: str, unwanted: Callable[[Any], bool]) -> None:
        """Takes values out of a list, or the key where none is left."""
        there = self.data.get(key)
        old = there if isinstance(there, list) else [there]
        kept = [each for each in old if not unwanted(each)]
        if key not in self.data or len(kept) == len(old):
            return
        node = self._value(key)
        if not kept:
            rest = {name: value for name, value in self.data.items() if name != key}
            name = next(each for each, _ in self._entries() if each.value == key)
            self._commit(self._without_lines(name.start_mark.index, self._end_of(node)), rest)
            return
        items = [item for item, value in zip(node.value, old, strict=True) if not unwanted(value)]
        source = self.source
        if node.flow_style:
            texts = ", ".join(source[each.start_mark.index : each.end_mark.index] for each in items)
            source = f"{source[: node.start_mark.index]}[{texts}]{source[node.end_mark.index :]}"
        else:
            for item in reversed([each for each in node.value if each not in items]):
                self._check_item(item)
                source = self._without_lines(item.start_mark.index, item.end_mark.index, source)
        self._commit(source, {**self.data, key: kept})

    def add_results(self, results: Iterable[EvalResult], model_name: str) -> None:
        """Puts results into `model-index`: the value of a measurement that is there is replaced, others are added."""
        new = list(results)
        if not new:
            return
        if self.data.get(MODEL_INDEX) is None:
            self.drop(MODEL_INDEX, lambda each: True)
            self.append(MODEL_INDEX, eval_results_to_model_index(model_name, new))
            return
        models = self.data[MODEL_INDEX]
        old = model_index_to_eval_results(copy.deepcopy(models))[1]
        places = [
            (MODEL_INDEX, number, "results", result, "metrics", metric, "value")
            for number, model in enumerate(models)
            for result, entry in enumerate(model["results"])
            for metric in range(len(entry["metrics"]))
        ]
        changes, added = {}, []
        for each in new:
            same = [place for place, found in zip(places, old, strict=True) if found.is_equal_except_value(each)]
            changes.update(dict.fromkeys(same, each.metric_value))
            added += [] if same else [each]
        self.rewrite(lambda place, value: changes.get(place, value))
        if added:
            items = eval_results_to_model_index(model_name, added)[0]["results"]
            longer = copy.deepcopy(self.data[MODEL_INDEX])
            longer[0]["results"] += items
            self._commit(self._with_results(items), {**self.data, MODEL_INDEX: longer})

    def rewrite(self, change: Callable[[tuple[Any, ...], Any], Any]) -> None:
        """
        Replaces values wherever they stand, but keys: `change` gets the place, `("model-index", 0, "name")`, and the
        value.
        """
        source, constructor = self.source, yaml.constructor.SafeConstructor()
        for place, node in sorted(_leaves(self._root(), ()), key=lambda each: -each[1].start_mark.index):
            value = constructor.construct_object(node)
            new = change(place, value)
            if new is not value and new != value:
                if node.style in ("|", ">"):
                    raise HeaderError("a value that is replaced must be a number or a word")
                source = source[: node.start_mark.index] + _inline(new) + source[node.end_mark.index :]
        self._commit(source, _changed(self.data, (), change))

    def _root(self) -> Any:
        return yaml.compose(self.source + "\n", Loader=yaml.SafeLoader)

    def _entries(self) -> list[tuple[Any, Any]]:
        root = self._root()
        if root is None or (isinstance(root, _SCALAR) and root.tag == _NULL):
            return []
        if not isinstance(root, _MAPPING) or root.flow_style:
            raise HeaderError("it must be a mapping in block style, one name a line")
        if any(not isinstance(key, _SCALAR) for key, _ in root.value):
            raise HeaderError("its names must be plain words")
        return list(root.value)

    def _value(self, key: str) -> Any:
        name, node = next(each for each in self._entries() if each[0].value == key)
        if node.start_mark.index < name.end_mark.index or isinstance(node, _MAPPING):
            raise HeaderError(f"{key} must be a list or a word of its own, but refers to another or is a mapping")
        if isinstance(node, _SCALAR) and node.style in ("|", ">"):
            raise HeaderError(f"{key} must be a list or a word, but is a block of text")
        if isinstance(node, _SEQUENCE) and any(not isinstance(each, _SCALAR) for each in node.value):
            raise HeaderError(f"{key} must be a list of words")
        return node

    def _end_of(self, node: Any) -> int:
        """Where the content of a node ends; what comes after it on its line, and comments below, are not its own."""
        if isinstance(node, _SCALAR) or node.flow_style or not node.value:
            end = int(node.end_mark.index)
        else:
            last = node.value[-1]
            end = self._end_of(last[1] if isinstance(last, tuple) else last)
        while end > node.start_mark.index and self.source[end - 1 : end].isspace():
            end -= 1
        return end

    def _check_item(self, node: Any) -> str:
        """The blanks before the dash of an item of a list in block style."""
        start = _line_start(self.source, node.start_mark.index)
        before = self.source[start : node.start_mark.index]
        if not _DASH.match(before):
            raise HeaderError("a list that is edited must have one item a line")
        return before[: before.index("-")]

    def _after_last_item(self, node: Any, items: list[list[str]]) -> str:
        """The source with items, each given by its lines, after the last one of a list in block style."""
        last = node.value[-1]
        end = self._end_of(last)
        rest = _REST_OF_LINE.match(self.source, end)
        if rest is None or last.start_mark.index < node.start_mark.index:
            raise HeaderError("the end of a list that is edited must be the end of its line")
        indent = self._check_item(last)
        added = "".join(self.newline + indent + line for lines in items for line in lines)
        return self.source[: rest.end()] + added + self.source[rest.end() :]

    def _without_lines(self, start: int, end: int, source: str | None = None) -> str:
        """The source without the lines from one place to another."""
        source = self.source if source is None else source
        start = _line_start(source, start)
        rest = _REST_OF_LINE.match(source, end)
        if rest is None:
            raise HeaderError("what is taken out must end with its line")
        after = re.match(r"\r\n|\r|\n|$", source[rest.end() :])
        end = rest.end() + (after.end() if after else 0)
        if end < len(source) or not start:
            return source[:start] + source[end:]
        return re.sub(r"(?:\r\n|\r|\n)\Z", "", source[:start])

    def _with_results(self, items: list[Any]) -> str:
        """The source with results after the last one of the first model."""
        index = next(node for key, node in self._entries() if key.value == MODEL_INDEX)
        model = index.value[0] if isinstance(index, _SEQUENCE) else None
        found = [pair for pair in model.value if pair[0].value == "results"] if isinstance(model, _MAPPING) else []
        if len(found) != 1 or not isinstance(found[0][1], _SEQUENCE):
            raise HeaderError("model-index must be a list of models with results")
        key, node = found[0]
        lines = [_dump([each]) for each in items]
        if not node.value:
            indent = self.newline + " " * key.start_mark.column
            added = "".join(indent + line for item in lines for line in item)
            before = self.source[: node.start_mark.index].rstrip(" \t")
            return before + added + self.source[node.end_mark.index :]
        if node.flow_style:
            raise HeaderError("model-index must be in block style")
        return self._after_last_item(node, lines)

    def _commit(self, source: str, data: Mapping[str, Any]) -> None:
        """Takes a source over if it says what it should, and else nothing."""
        try:
            read = _read(source)
        except HeaderError:
            read = {}
        if repr(read) != repr(dict(data)):  # by repr: nan is not equal to itself
            changed = next((key for key in (*data, *read) if repr(read.get(key)) != repr(data.get(key))), "its order")
            raise HeaderError(f"an edit must change one name only, but would change {changed}")
        self.source, self.data = source, read


def _read(source: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(source + "\n")
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # the middle two: odd dates and keys
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 2}" if mark is not None else ""
        raise HeaderError(f"it is no YAML: {' '.join(str(problem).split())}{line}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise HeaderError(f"it must be a mapping of names to values, but is a {type(data).__name__}")
    return data


def _dump(value: Any) -> list[str]:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=float("inf"), default_flow_style=False)
    return str(text).rstrip("\n").split("\n")


def _inline(value: Any) -> str:
    """One value on one line, safe in a list in brackets too."""
    text = yaml.safe_dump([value], allow_unicode=True, width=float("inf"), default_flow_style=True)
    return str(text).strip()[1:-1]


def _line_start(source: str, place: int) -> int:
    return max(source.rfind("\n", 0, place), source.rfind("\r", 0, place)) + 1


def _leaves(node: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Places and nodes of what is neither a list nor a mapping."""
    if isinstance(node, _MAPPING):
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                continue
            yield from _leaves(value, (*place, key.value))
    elif isinstance(node, _SEQUENCE):
        for number, value in enumerate(node.value):
            yield from _leaves(value, (*place, number))
    elif node is not None:
        yield place, node


def _changed(data: Any, place: tuple[Any, ...], change: Callable[[tuple[Any, ...], Any], Any]) -> Any:
    new = change(place, data)
    if new is not data and new != data:
        return new
    if isinstance(data, dict):
        return {key: _changed(value, (*place, key), change) for key, value in data.items()}
    if isinstance(data, list):
        return [_changed(value, (*place, number), change) for number, value in enumerate(data)]
    return data
