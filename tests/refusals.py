"""What a refusal of the command line looks like."""


def assert_refused(result, *parts):
    code, lines = result
    assert code == 2
    assert len(lines) == 1, lines
    for part in ("error:", *parts):
        assert part in lines[0]
