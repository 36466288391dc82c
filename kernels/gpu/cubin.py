"""What a cubin says about its own parameters: an ELF file of which only the section `.nv.info.KERNEL` is read."""

from __future__ import annotations

import struct

WORD, HALF_VALUE = 0x04, {0x01, 0x02, 0x03}  # attribute forms: a payload with its length, or two bytes in place
PARAMETER = 0x17  # EIATTR_KPARAM_INFO: index, ordinal, offset, and a word whose upper 14 bits are the size
PARAMETERS_SIZE = 0x19  # EIATTR_CBANK_PARAM_SIZE
ELF_HEADER, SECTION = "<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ"


def section(elf: bytes, wanted: str) -> bytes:
    """The bytes of one section. Raises ValueError when there is none of that name or `elf` is no 64-bit ELF file."""
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    *_, at, _, _, _, _, size, count, names = struct.unpack_from(ELF_HEADER, elf)
    table = [struct.unpack_from(SECTION, elf, at + i * size) for i in range(count)]
    text = table[names][4]
    for name, _, _, _, start, length, *_ in table:
        end = elf.index(b"\0", text + name)
        if elf[text + name : end].decode() == wanted:
            return elf[start : start + length]
    raise ValueError(f"no section {wanted}")


def parameters(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """(offset, bytes) of every parameter in order. Raises ValueError for a kernel that is not in the file."""
    info = section(cubin, f".nv.info.{kernel}")
    found: dict[int, tuple[int, int]] = {}
    total = at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != WORD:
            assert form in HALF_VALUE, f"attribute form {form:#x}"
            total = size if attribute == PARAMETERS_SIZE else total
            continue
        if attribute == PARAMETER:
            _, ordinal, offset, word = struct.unpack_from("<IHHI", info, at)
            found[ordinal] = (offset, word >> 18)
        at += size
    out = [found[i] for i in range(len(found))]
    assert not out or total == sum(out[-1]), f"parameters end at {sum(out[-1])}, the kernel says {total}"
    return out
