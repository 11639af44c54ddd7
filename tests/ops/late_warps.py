"""Find in a compiled kernel what a late warp may load after it was written over.

A scalar, or a tensor of fewer elements than a program has threads, is held by several warps alike. Each of them loads
it, and one of them stores. So where a program loads and then stores in the same memory, and nothing between waits for
all threads, a late warp finds the new value and goes another way than the others. No test sees that for sure; the
compiled code (PTX) shows it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

__all__ = ["late_loads"]

_NO_ADDRESS = {"ld", "st", "atom", "red", "bra", "bar", "setp", "cp", "shfl"}
"""What does not compute an address from others."""
_LOADS = ("ld.global", "ld.volatile", "ld.relaxed", "ld.acquire")
_STORES = ("st.global", "st.volatile")
_WAITS = ("bar.sync", "barrier.")


class _Instruction(NamedTuple):
    """One of PTX: whether it depends on a predicate, what it does, and with what."""

    is_predicated: bool
    name: str
    operands: str

    @property
    def address(self) -> str | None:
        """The register that has it, where memory is loaded or stored."""
        found = re.findall(r"\[\s*(%\w+)", self.operands)
        return found[0] if found else None


def late_loads(ptx: str) -> list[str]:
    """Loads of a kernel after which it stores by the same argument, with no wait for all threads on some path between.

    Args:
        ptx: Of one kernel, whose arguments point to memory that does not overlap.
    """
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    pointers = re.findall(r"\.ptr\b.*?(\w+_param_\d+)", ptx[: -len(body)])
    instructions, labels = _read(body)
    arguments = _arguments_of_registers(instructions, set(pointers))

    def of(instruction: _Instruction) -> set[str]:
        return arguments[instruction.address] if instruction.address else set()

    found = []
    for place, load in enumerate(instructions):
        if not load.name.startswith(_LOADS) or not of(load):
            continue
        seen, ahead = set(), _following(instructions, labels, place)
        while ahead:
            place_ahead = ahead.pop()
            if place_ahead in seen:
                continue
            seen.add(place_ahead)
            one = instructions[place_ahead]
            if one.name.startswith(_WAITS):
                continue
            if one.name.startswith(_STORES) and of(one) & of(load):
                found.append(f"{load.name} {load.operands} before {one.name} {one.operands}")
                break
            ahead += _following(instructions, labels, place_ahead)
    return found


def _read(body: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions of a kernel, and at which of them its labels stand."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        text = line.split("//")[0].strip()
        if label := re.match(r"(\$L\w+):", text):
            labels[label.group(1)] = len(instructions)
        elif not text.startswith(".loc"):
            for part in text.split(";"):
                found = re.match(r"[{\s]*(@!?%p\d+\s+)?([a-z][\w.:]*)\s*(.*)", part)
                if found:
                    instructions.append(_Instruction(found.group(1) is not None, found.group(2), found.group(3)))
    return instructions, labels


def _arguments_of_registers(instructions: list[_Instruction], pointers: set[str]) -> dict[str, set[str]]:
    """From which pointers among the kernel's arguments registers are computed."""
    arguments: dict[str, set[str]] = defaultdict(set)
    is_new = True
    while is_new:
        is_new = False
        for one in instructions:
            registers = re.findall(r"%\w+", one.operands)
            if not registers:
                continue
            if one.name.startswith("ld.param"):
                sources = pointers & set(re.findall(r"\w+_param_\d+", one.operands))
            elif one.name.split(".")[0] in _NO_ADDRESS:
                continue
            else:
                sources = set().union(*(arguments[register] for register in registers[1:]))
            if not sources <= arguments[registers[0]]:
                arguments[registers[0]] |= sources
                is_new = True
    return arguments


def _following(instructions: list[_Instruction], labels: dict[str, int], place: int) -> list[int]:
    """Where a thread may go from an instruction."""
    one = instructions[place]
    following = []
    if one.name.startswith("bra"):
        following += [labels[label] for label in re.findall(r"\$L\w+", one.operands) if label in labels]
    if one.is_predicated or not one.name.startswith(("bra", "ret", "exit")):
        following.append(place + 1)
    return [there for there in following if there < len(instructions)]
