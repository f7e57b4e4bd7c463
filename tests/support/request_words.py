"""The request words of Linux 7.3 in each of the three codings, as its headers have them."""

from __future__ import annotations

from userfault.kernel import _ioc

GENERIC = {
    "NEW": 0x0000AA00, "API": 0xC018AA3F, "REGISTER": 0xC020AA00, "UNREGISTER": 0x8010AA01,
    "WAKE": 0x8010AA02, "COPY": 0xC028AA03, "ZEROPAGE": 0xC020AA04, "MOVE": 0xC028AA05,
    "WRITEPROTECT": 0xC018AA06, "CONTINUE": 0xC020AA07, "POISON": 0xC020AA08, "RWPROTECT": 0xC018AA09,
    "SET_MODE": 0x4010AA0A, "PAGEMAP_SCAN": 0xC0606610,
}  # fmt: skip
ONE_WAY = {"UNREGISTER": 0x4010AA01, "WAKE": 0x4010AA02, "SET_MODE": 0x8010AA0A}
# Both directions are the same bits in all three: 0b110 before a size field that is one bit narrower than 0b11's.
# One direction is in PowerPC's coding what it is in PA-RISC's by coincidence: 2 in three bits is 1 in two.
WORDS = {
    "x86_64": GENERIC,
    "ppc64le": GENERIC | ONE_WAY | {"NEW": 0x2000AA00},
    "parisc": GENERIC | ONE_WAY,
}


def encoded(coding: _ioc.IocCoding) -> dict[str, int]:
    """Return the words as we make them in a coding, from the parts of the generic ones."""
    sized = {1: _ioc.iow, 2: _ioc.ior, 3: _ioc.iowr}
    words = {}
    for request, word in GENERIC.items():
        direction, size, magic, number = word >> 30, word >> 16 & 0x3FFF, word >> 8 & 0xFF, word & 0xFF
        if direction == 0:
            words[request] = _ioc.io(magic, number, coding)
        else:
            words[request] = sized[direction](magic, number, size, coding)
    return words
