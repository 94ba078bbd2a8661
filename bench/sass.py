"""What a program of a kernel executes, counted in its machine code.

The code is cut into blocks at labels and branches. A backward branch closes a loop, whose instructions count as often
as it turns; of the ways past a condition the longest counts, since it is the one that does the work, or the shortest
where a kernel keeps rare rows in a branch of their own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

# What is counted apart: a pattern for the name of the instruction each.
KINDS = {"matrix": r"(HGMMA|[HIQ]MMA|UTC\w*MMA)", "barriers": r"BAR\.", "loads": r"LDG"}


class Block(NamedTuple):
    """Instructions that run together: their counts, and the indices of the blocks that may follow."""

    counts: Counter[str]
    follows: tuple[int, ...]


def blocks(sass: str) -> list[Block]:
    """The blocks of the (one) function in what nvdisasm prints, in order of their addresses."""
    bodies: list[list[tuple[str, str]]] = [[]]
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            if bodies[-1]:
                bodies.append([])
            labels[label.group(1)] = len(bodies) - 1
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?);", line):
            predicate, name, operands = found.groups()
            bodies[-1].append((name, operands))
            if name.startswith(("BRA", "EXIT", "RET")) and not name.startswith("BRA.DIV"):
                never_passes = predicate is None and "UP" not in operands and "!P" not in operands
                bodies[-1].append(("/ends" if never_passes else "/may go on", ""))
                bodies.append([])
    result = []
    for index, body in enumerate(bodies):
        counts: Counter[str] = Counter()
        follows = []
        goes_on = True
        for name, operands in body:
            if name.startswith("/"):
                goes_on = name == "/may go on"
                continue
            counts["all"] += name != "NOP"
            for kind, pattern in KINDS.items():
                counts[kind] += bool(re.match(pattern, name))
            if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
                counts["multiplied"] += math.prod(map(int, shape.groups()))
            if name.startswith("BRA") and not name.startswith("BRA.DIV"):
                follows.append(re.search(r"\.L_\w+", operands).group(0))
        targets = tuple(labels[label] for label in follows if labels[label] < len(bodies))
        result.append(Block(counts, targets + ((index + 1,) if goes_on and index + 1 < len(bodies) else ())))
    return result


def loops(code: list[Block]) -> list[tuple[int, int]]:
    """(first, last) block of every loop, outer ones before those inside, in order; a block that only branches to
    itself (the end of a function) is none."""
    found = {}
    for index, block in enumerate(code):
        for target in block.follows:
            if target <= index and not (target == index and block.counts["all"] <= 1):
                found[target] = max(index, found.get(target, 0))
    return sorted(found.items(), key=lambda loop: (loop[0], -loop[1]))


def executed(sass: str, turns: tuple[float, ...] | float = (), shortest: bool = False) -> Counter[str]:
    """Instructions that one warp executes, by kind; `turns` of each loop in the order of `loops`, 1 for others. One
    number: of the loops with matrix instructions, 0 for others behind them."""
    code = blocks(sass)
    weight = [1.0] * len(code)
    found = loops(code)
    if isinstance(turns, float):
        multiplies = [any(block.counts["matrix"] for block in code[first : last + 1]) for first, last in found]
        main = multiplies.index(True)
        turns = (1.0,) * main + tuple(turns if has_products else 0.0 for has_products in multiplies[main:])
    for (first, last), times in zip(found, turns, strict=False):
        for index in range(first, last + 1):
            weight[index] *= times
    best: list[tuple[float, Counter[str]]] = [(0.0, Counter())] * len(code)
    for index in reversed(range(len(code))):
        own = Counter({kind: count * weight[index] for kind, count in code[index].counts.items()})
        ways = [best[target] for target in code[index].follows if target > index]
        if ways:
            own = own + (min if shortest else max)(ways, key=lambda way: way[0])[1]
        best[index] = (own["all"], own)
    return best[0][1]


def busiest_loop(sass: str) -> Counter[str]:
    """The instructions of one turn of the loop with the most matrix instructions (the longest where none has any)."""
    code = blocks(sass)
    bodies = [sum((b.counts for b in code[first : last + 1]), Counter()) for first, last in loops(code)]
    return max(bodies, key=lambda body: (body["matrix"], body["all"]), default=Counter())
