"""Whether a pinned package has a known advisory, or was withdrawn, as far as the index tells.

    python .ci/advisories.py [requirements.lock]

Exit status 1 for one that is not accepted below. An index that cannot be reached is said, no error.
"""

import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

INDEX = "https://pypi.org/pypi"
ACCEPTED = {
    "PYSEC-2026-1939": "sqlitedict unpickles a cache file that somebody else wrote; lm-eval needs "
    "the package for its cache of answers, which the kit never turns on",
}


def asked(name: str) -> dict | None:
    """What the index says of a package (or "name/version"); None where it knows none."""
    try:
        with urllib.request.urlopen(f"{INDEX}/{name}/json", timeout=30) as reply:
            return json.load(reply)
    except urllib.error.HTTPError:
        return None


def told(pin: str) -> tuple[str, list[str] | None]:
    """(pin, what speaks against it; None where the index does not say)."""
    name, version = pin.split("==")
    about = asked(f"{name}/{version}")
    if about is None:  # an index that knows advisories of the newest release only
        about = asked(name) or {"info": {}}
    files = about.get("releases", {}).get(version) or about.get("urls", [])
    found = ["withdrawn"] if any(file.get("yanked") for file in files) else []
    if about["info"].get("version") != version:
        return pin, found or None
    known = [a for a in about.get("vulnerabilities", []) if not a.get("withdrawn")]
    return pin, found + [
        a["id"] for a in known if not ACCEPTED.keys() & {a["id"], *a.get("aliases", [])}
    ]


def main() -> int:
    """Exit status."""
    with open((sys.argv[1:] or ["requirements.lock"])[0], encoding="utf-8") as lock:
        pins = [line.split(";")[0].strip() for line in lock if "==" in line and line[0] != "#"]
    try:
        with ThreadPoolExecutor(8) as workers:
            answers = dict(workers.map(told, pins))
    except OSError as error:
        print(f"the package index cannot be reached ({error}): advisories were not asked for")
        return 0
    bad = {pin: found for pin, found in answers.items() if found}
    unknown = sum(found is None for found in answers.values())
    print(f"{len(pins)} packages, {len(bad)} with an advisory; of {unknown} the index says nothing")
    for pin, found in bad.items():
        print(f"{pin}: {', '.join(found)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
