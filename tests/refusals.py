"""What a refusal of the command line looks like."""


def assert_refused(result, *parts):
    code, lines = result
    # Beside what every run with code of its own says.
    lines = [line for line in lines if "executes code of its own" not in line]
    assert code == 2
    assert len(lines) == 1, lines
    for part in ("error:", *parts):
        assert part in lines[0]
