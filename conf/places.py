"""What may be the name of a folder or a file that a configuration asks for: one that stays below the place where such things go."""

_LONGEST = 200  # bytes of a part: file systems allow 255, and suffixes come on top


def wrong(name: str, *, parts: bool = False) -> str:
    """What is wrong with a name, as a sentence; "" for nothing. `parts`: it may have several, with slashes between."""
    if not name.isprintable() or "\ufffd" in name:
        return "must be one line of printable text"
    for part in name.split("/") if parts else [name]:
        if not part.strip() or part in (".", "..") or "/" in part or part.startswith(("-", "~")):
            how = "no part of it empty, . or .., none begins with - or ~" if parts else "no slash, not . or .., and no - or ~ at its begin"
            return f"must be a name that stays in its folder: {how}"
        if len(part.encode("utf-8", "surrogatepass")) > _LONGEST:
            return f"must have {_LONGEST} bytes at most" + (" in each part" if parts else "")
    return ""


def nearest(name: str, *, parts: bool = False) -> str:
    """A name that is like it, and right."""
    kept = "".join(c if c.isprintable() and c not in "\ufffd\\" else "_" for c in name)
    found = [part.strip().lstrip("-~.")[:60].strip() for part in kept.split("/")]
    return ("/" if parts else "_").join(part for part in found if part) or "run"
