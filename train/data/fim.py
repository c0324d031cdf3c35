"""Fill in the middle: some training documents are reordered, so that a model learns to write what stands between two given texts.

A document becomes BEGIN prefix HOLE suffix END middle ("prefix, suffix, middle", arXiv 2207.14255; DeepSeek-V3 section 4.1), before
packing. Which documents, and where they are cut, follows from a hash of their text: a cache is the same whoever builds it.
"""

import hashlib


def cut(text: str, rate: float) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix), which together are the text and of which any may be empty; None where the document stays as it is.

    A share `rate` of all texts is cut, at two places that are independent and uniform over the borders of characters.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=24, person=b"fill-in-middle").digest()
    choice, one, other = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    if choice >= rate * 2**64:
        return None
    first, second = sorted(number * (len(text) + 1) >> 64 for number in (one, other))
    return text[:first], text[first:second], text[second:]
