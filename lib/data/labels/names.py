"""Names of labels and columns: how they are shown, compared, ordered, and matched with the outputs of a model."""

import shlex
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from lib.data.labels.numerals import INTEGER, WHOLE, are_integers
from lib.errors import UserError

SHOWN = 20
"""As many names are listed in a message."""


def shown(name: Any) -> str:
    """A name as it stands in a message: in quotes if it holds spaces or signs that cannot be seen."""
    text = str(name)
    if text and text.isprintable() and text == unicodedata.normalize("NFC", text) and not set(text) & set(" ,'\""):
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """A name in quotes, with signs that cannot be seen or told apart as escapes."""
    return repr(text) if text == unicodedata.normalize("NFC", text) else ascii(text)


def listed(names: Collection[Any]) -> str:
    """Names in a message, at most 20 of them."""
    return ", ".join([*map(shown, list(names)[:SHOWN]), *(["..."] if len(names) > SHOWN else [])])


def folded(name: str) -> str:
    """A name without what readers overlook: case, spaces, signs of no width, and the form of its characters."""
    text = "".join(sign for sign in unicodedata.normalize("NFKC", name) if unicodedata.category(sign) != "Cf")
    return unicodedata.normalize("NFKC", " ".join(text.casefold().split()))


def is_blank(name: str) -> bool:
    return folded(name) == ""


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only in case, spaces, the form of their characters, or in .0 after a number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = folded(name)
        whole = WHOLE.fullmatch(key)
        groups.setdefault(whole[1] if whole else key, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def look_alike_notes(counts: dict[str, int]) -> tuple[str, ...]:
    """Warnings on different labels that look alike, with their rows; and on labels with spaces at an end."""
    notes = []
    for group in look_alikes(counts)[:SHOWN]:
        rows = ", ".join(f"{quoted(name)} ({counts[name]:,} rows)" for name in group)
        notes.append(f"warning: labels that look alike are {len(group)} different ones: {rows}")
    padded = [name for name in counts if name != name.strip()]
    if padded:
        some = ", ".join(map(quoted, padded[:5]))
        notes.append(f"warning: spaces at the ends of labels belong to their names: {some}")
    return tuple(notes)


def in_order(names: Collection[Any]) -> list[Any]:
    """Distinct labels in order: numbers, also as text, by value; other text by its characters."""
    texts = [name for name in names if isinstance(name, str)]
    if not texts:
        return sorted(names)
    if are_integers(texts):
        return sorted(texts, key=int)
    if all(INTEGER.fullmatch(text) or WHOLE.fullmatch(text) for text in texts):
        return sorted(texts, key=lambda text: (int(text.partition(".")[0]), text))
    return sorted(texts)


def same_number(text: str, names: Collection[str]) -> str | None:
    """The only one of `names` that is the whole number `text` written with or without .0, such as 1 for 1.0."""
    whole = WHOLE.fullmatch(text) or INTEGER.fullmatch(text)
    value = int(text.partition(".")[0]) if whole else None
    same = [
        name
        for name in names
        if whole and (WHOLE.fullmatch(name) or INTEGER.fullmatch(name)) and int(name.partition(".")[0]) == value
    ]
    return same[0] if len(same) == 1 else None


def resembling(name: str, names: Iterable[str]) -> str:
    """A hint on the first of `names` that looks like `name`; empty where there is none."""
    alike = next((other for other in names if folded(other) == folded(name)), None)
    return "" if alike is None else f"; {quoted(name)} and {quoted(alike)} differ in case, spaces or form of characters"


def has_default_names(model_names: Sequence[str]) -> bool:
    """Whether a model's outputs are named LABEL_0, LABEL_1, ..., that is, not at all."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(model_names))


def match_model(
    names: Sequence[str], model_names: Sequence[str], order: Sequence[str] = (), numbers: Sequence[int] | None = None
) -> tuple[list[int], list[str], tuple[str, ...]]:
    """The output of a model for each label of the data, the names of the outputs, and notes.

    Labels are matched by --label_order if given, by name, or, if the outputs have no names, by `numbers`: the number that
    each label is. Raises UserError when none of these fits, and for text labels when the outputs have no names.
    """
    if order and list(order) != list(model_names):
        return match_order(names, model_names, order)
    exact = {name: output for output, name in enumerate(model_names)}
    loose = {name.lower(): output for output, name in enumerate(model_names)}
    outputs = [exact.get(name, loose.get(name.lower(), -1)) for name in names]
    if -1 not in outputs and len(set(outputs)) == len(outputs):
        respelled = [
            (name, model_names[output]) for name, output in zip(names, outputs, strict=True) if name not in exact
        ]
        notes = tuple(f"label {shown(name)} is the model's {shown(other)}" for name, other in respelled[:SHOWN])
        return outputs, list(model_names), notes
    if has_default_names(model_names):
        if numbers is not None and all(0 <= number < len(model_names) for number in numbers):
            known = dict(zip(numbers, names, strict=True))
            outputs_of = [known.get(number, str(number)) for number in range(len(model_names))]
            note = f"the model's outputs have no names; label {shown(names[0])} is its output {numbers[0]}, and so on"
            return list(numbers), outputs_of, (note,)
        raise UserError(
            f"the model's classes ({listed(model_names)}) are not those of the data ({listed(names)}), since its outputs "
            f"have no names; give the data's labels in the order of the outputs: --label_order {flag_values(names)}"
        )
    raise UserError(
        f"the model's classes ({listed(model_names)}) are not those of the data ({listed(names)}); score a model trained "
        "on these labels, or give the data's labels in the order of the model's classes: --label_order"
    )


def flag_values(names: Sequence[str]) -> str:
    """A few names as they are typed after a flag."""
    return " ".join([*map(shlex.quote, names[:5]), *(["..."] if len(names) > 5 else [])])


def match_order(
    names: Sequence[str], model_names: Sequence[str], order: Sequence[str]
) -> tuple[list[int], list[str], tuple[str, ...]]:
    """What `match_model` returns where --label_order gives the data's labels in the order of the model's outputs."""
    if len(order) != len(model_names):
        raise UserError(
            f"--label_order names {len(order)} labels, but the model has {len(model_names)}: {listed(model_names)}"
        )
    if sorted(map(str.lower, order)) == sorted(map(str.lower, model_names)):
        raise UserError(
            f"--label_order {listed(order)}: the order of the model is {listed(model_names)}; leave --label_order out"
        )
    check_in_order(names, order)
    place = {name: output for output, name in enumerate(order)}
    outputs = [place[name] for name in names]
    if has_default_names(model_names):
        return outputs, list(order), ()
    pairs = ", ".join(f"{shown(name)} = {shown(other)}" for name, other in zip(order, model_names, strict=True))
    return outputs, list(model_names), (f"labels of the data and of the model (--label_order): {pairs}",)


def check_names(names: Iterable[str], column: str) -> None:
    """Raise UserError for a name of spaces or of signs that cannot be seen."""
    for name in names:
        if is_blank(name):
            raise UserError(f"--label_column {column}: one of its classes has the blank name {quoted(name)}; name it")


def check_in_order(names: Iterable[str], order: Sequence[str]) -> None:
    """Raise UserError for a label of the data that --label_order lacks."""
    lacking = [name for name in names if name not in order]
    if lacking:
        hint = resembling(lacking[0], order)
        raise UserError(f"--label_order lacks the label {', '.join(map(shown, lacking[:SHOWN]))} of the data{hint}")


def put_in_order(names: Sequence[str], order: Sequence[str]) -> list[int]:
    """The places in `names` of the labels that --label_order gives for a new model, in that order.

    Raises UserError unless it names each label of the data, and no others.
    """
    check_in_order(names, order)
    unknown = [name for name in order if name not in names]
    if unknown:
        hint = resembling(unknown[0], names)
        raise UserError(f"--label_order {shown(unknown[0])}: the data have no such label, but {listed(names)}{hint}")
    return [list(names).index(name) for name in order]
