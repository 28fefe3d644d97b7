"""A function of both mutation scripts: checks that the text of each row occurs exactly once."""


def unmatched(root, rows):
    """Returns a line for each row (file, from, to, ..) whose text does not occur exactly once in its file, or that changes nothing."""
    wrong = []
    for file, old, new, *_ in rows:
        source = root / file
        if not source.is_file():
            wrong.append(f"{file}: no such file")
        elif (count := source.read_text().count(old)) != 1:
            wrong.append(f"{file}: {count} occurrences of: {old}")
        elif old == new:
            wrong.append(f"{file}: changes nothing: {old}")
    return wrong
