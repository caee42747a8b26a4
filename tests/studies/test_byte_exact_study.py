"""The study of exact bytes: what was measured beside genlm-bytes is kept, and its table."""

import json

from jaxtok.studies.byte_exact import ByteCuts


def test_what_was_measured_beside_beams_is_not_measured_again(tmp_path):
    """No model is given, so that none could be asked."""
    rows = [
        {
            "jaxtok": {"bits": bits, "far": 0.01, "seconds": 0.5},
            "beam of 5": {"bits": bits + 1, "far": 0.03, "seconds": 4.0},
        }
        for bits in (1.0, 2.0)
    ]
    (tmp_path / "peer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cuts = [[(b"abc", 100, True), (b"a", 98, False), (b"abcd", 101, False)]]
    study = ByteCuts(peer=3, peer_bytes=2)
    table = study._beside_beams(None, None, cuts, tmp_path / "peer.jsonl")
    assert "| jaxtok | 1.5000 ± 0.3536 | 0.0100 ± 0.0000 | 0.50 |" in table
    assert "| beam of 5 | 2.5000 ± 0.3536 | 0.0300 ± 0.0000 | 4.00 |" in table and "2 prompts of 2 bytes" in table
