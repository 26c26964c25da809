"""The benchmark of handing over a rollout batch, whose figures docs/cluster.md has."""

from benchmarks import rollout_bytes


def test_the_benchmark(monkeypatch, capsys):
    """A rank receives its own tokens and at most 32 bytes per response; before, everything there was."""
    arguments = "rollout_bytes --real 2 --ranks 8 32 --responses 4 --mean 200".split()
    monkeypatch.setattr("sys.argv", arguments)
    rollout_bytes.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [name.strip() for name, *_ in rows] == ["2 real", "8 simulated", "32 simulated"]

    def numbers(text):
        return [float(value) for value in text.replace(",", "").split()]

    for name, tokens, now, before in rows:
        ranks, (own,) = int(name.split()[0]), numbers(tokens)
        received, _, peak, objects = numbers(now)
        all_received, _, all_peak, all_objects = numbers(before)
        assert own < received <= own + 32 * 4 * ranks
        assert all_received > 2 / 3 * (ranks - 1) * own
        assert objects < 50 * 4 * ranks < all_objects and peak < all_peak
