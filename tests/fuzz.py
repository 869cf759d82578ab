"""Fuzzes one of test_fuzz.py's parsers, guided by what is reached. Needs atheris.

    python tests/fuzz.py http FOLDER -max_total_time=60

FOLDER keeps what led somewhere new, a seed a file; if it is empty, tests/seeds/ goes there first.
What follows are libFuzzer's options. Ends at the first finding, and writes its seed beside it.
"""

import json
import random
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1])]
OURS = ["encoder", "serve", "utils", "corpus", "model_files", "plumbing", "serving"]
with atheris.instrument_imports(include=OURS):
    from test_fuzz import GOOD, SEEDS, check, mutated

    import serve  # noqa: F401 (test_fuzz.py imports it later)


def main(parser, folder, *options):
    def read(data):
        check(parser, json.loads(data or "[]"))

    def mutate(data, n_most, seed):
        changes = mutated(json.loads(data or "[]"), GOOD[parser], random.Random(seed))
        longer = json.dumps(changes).encode()
        return longer if len(longer) <= n_most else data

    Path(folder).mkdir(parents=True, exist_ok=True)
    if not any(Path(folder).iterdir()):
        for i, line in enumerate((SEEDS / f"{parser}.jsonl").read_text().splitlines()):
            Path(folder, f"seed-{i}").write_text(line)
    flags = [folder, f"-artifact_prefix={folder}-", *options]
    atheris.Setup([sys.argv[0], *flags], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
