"""Download one category of the Amazon reviews and make items.jsonl and interactions.jsonl from it.

Releases  2018 (Ni et al., EMNLP 2019; times in seconds), and 2023 (Hou et al., arXiv 2403.03952;
          times in milliseconds, only a user's first rating of an item). No explicit licence.
Reads     the ratings and the metadata of the category, downloaded once from --url into --cache;
          a download that was cut is continued, also by a later run
Writes    DIR/items.jsonl         {"item_id", "title", "description", "brand", "categories"}
          DIR/interactions.jsonl  {"user_id", "items": [...], "timestamps": [...]}, in order of time

Kept are the ratings from --since to --until of items that have a text, and of these the k-core:
users and items with fewer than --min-count ratings are dropped until all have as many. A rating
that is in the file twice, with the same time, counts once. --peers follows MiniOneRec instead:
repeated ratings are kept, and items need a title of at most 20 words.

Examples, from the project's root
  python tests/data/make_amazon.py Musical_Instruments --year 2023 --out data/music
  python tokenize_items.py --data data/music --run runs/music
  python tests/data/make_amazon.py Industrial_and_Scientific --out data/industrial --peers \\
      --since 2016-10 --until 2018-11
"""
import argparse
import calendar
import gzip
import html
import json
import math
import os
import re
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, Iterator

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError, ProtocolError
from urllib3.util import Retry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tokenize_items import item_text, make_parser, number, stop, write_jsonl  # noqa: E402

URL = "https://mcauleylab.ucsd.edu/public_datasets/data"
RELEASES = {
    2018: {
        "ratings": "amazon_v2/categoryFilesSmall/{}.csv",
        "metadata": "amazon_v2/metaFiles2/meta_{}.json.gz",
        "columns": ("item", "user", "rating", "time"),          # of the ratings
        "times_per_second": 1,
        "item_id": "asin", "brand": "brand", "categories": "category",      # names in the metadata
    },
    2023: {
        "ratings": "amazon_2023/benchmark/0core/rating_only/{}.csv.gz",
        "metadata": "amazon_2023/raw/meta_categories/meta_{}.jsonl.gz",
        "columns": ("user", "item", "rating", "time"),
        "times_per_second": 1000,
        "item_id": "parent_asin", "brand": "store", "categories": "categories",
    },
}
HEADER = "user_id,"                     # how the first line of the 2023 ratings begins
TIMEOUT = (10, 60)                      # seconds to connect, and to wait for the next bytes
RETRIES = Retry(total=4, backoff_factor=1, status_forcelist=(408, 425, 429, 500, 502, 503, 504))
ATTEMPTS = 5                            # requests for one file if its download is cut each time
TAG = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>]*>", re.I | re.S)
PAGE_CODE = re.compile(r"<span id|getTime")     # found in titles that are code of the web page


# ---- Download ------------------------------------------------------------------------------------

def fetch(session: requests.Session, url: str, part: Path) -> None:
    """Append to `part` what is missing; raises urllib3's HTTPError if the download is cut."""
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        length = reply.headers.get("Content-Length", "unknown")
        total = reply.headers.get("Content-Range", length).split("/")[-1]   # "bytes 7-9/10" -> "10"
        if reply.status_code != 416:                    # 416: `part` has all bytes already
            reply.raise_for_status()
            resumed = reply.status_code == 206          # otherwise the host sends the whole file
            with open(part, "ab" if resumed else "wb") as file:
                bar = tqdm(desc=part.stem, initial=file.tell(), unit="B", unit_scale=True,
                           disable=None)
                for block in reply.raw.stream(1 << 16, decode_content=False):   # a .gz stays a .gz
                    bar.update(file.write(block))
                bar.close()
    size = part.stat().st_size
    if total.isdigit() and size != int(total):
        raise ProtocolError(f"{size} of {total} bytes arrived")


def download(host: str, name: str, cache: Path) -> Path:
    """Download HOST/NAME to CACHE/NAME unless it is there; -> its path."""
    url, path = f"{host}/{name}", cache / name
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=RETRIES))
    problem = None
    for _ in range(ATTEMPTS):
        try:
            fetch(session, url, part)
            os.replace(part, path)
            return path
        except HTTPError as error:
            problem = error
        except requests.RequestException as error:
            stop(f"{error}; check the category, --year and --url, or try again later")
        except OSError as error:
            stop(f"{path}: cannot be written ({error})")
    stop(f"{url}: {problem}; run again to download the rest, or delete {part} to start anew")


# ---- Reading the dumps ---------------------------------------------------------------------------

def read_dump(path: Path, parse: Callable) -> Iterator:
    """Yield parse(line) for each line of a downloaded file; stops if the file is damaged."""
    line_number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line_number, line in enumerate(file, 1):
                if not line.startswith(HEADER):
                    yield parse(line)
    except (OSError, EOFError, zlib.error,              # not a whole .gz file
            ValueError, LookupError, TypeError) as error:           # not a rating, or not an item
        stop(f"{path}: damaged at or after line {line_number} ({error}); delete it and run again")


def read_ratings(path: Path, release: dict, since: float, until: float) -> Iterator[tuple]:
    """Yield (user, item, time) of each rating with since <= seconds < until; the time is the file's."""
    def parse(line: str) -> tuple:
        cells = dict(zip(release["columns"], line.split(",")))
        return cells["user"], cells["item"], int(cells["time"])

    earliest, latest = since * release["times_per_second"], until * release["times_per_second"]
    for rating in read_dump(path, parse):
        if earliest <= rating[2] < latest:
            yield rating


def plain(text: object) -> str:
    """Remove HTML from a text or a list of them: ["<b>A&amp;B</b>", "c"] -> "A&B c"."""
    text = " ".join(map(str, text)) if isinstance(text, list) else str(text or "")
    return " ".join(TAG.sub(" ", html.unescape(text)).split())


def read_metadata(path: Path, release: dict, wanted: set, peers: bool) -> dict[str, dict]:
    """The wanted items that have a text, id -> item; with `peers`, a title of at most 20 words."""
    def parse(line: str) -> tuple[str, dict]:
        row = json.loads(line)
        return str(row[release["item_id"]]), row

    items = {}
    for item_id, row in tqdm(read_dump(path, parse), desc="metadata", unit=" items", disable=None):
        if item_id not in wanted or item_id in items:
            continue
        title = str(row.get("title") or "").strip(' "')
        if PAGE_CODE.search(title):
            title = ""
        if peers and (len(title) < 2 or len(title.split(" ")) > 20):
            continue
        categories = [plain(name) for name in row.get(release["categories"]) or []]
        item = {
            "item_id": item_id,
            "title": plain(title),
            "description": plain(row.get("description") or row.get("features")),
            "brand": plain(row.get(release["brand"])),
            "categories": " > ".join(name for name in categories if name),
        }
        if item_text(item):
            items[item_id] = item
    return items


# ---- k-core --------------------------------------------------------------------------------------

def k_core(histories: dict[str, list], min_count: int) -> dict[str, list]:
    """Drop users and items with fewer than `min_count` ratings until none is left.

    histories: user -> [(time, item), ...]
    """
    while True:
        ratings_of_item = Counter(item for pairs in histories.values() for _, item in pairs)
        kept = {}
        for user, pairs in histories.items():
            pairs = [(when, item) for when, item in pairs if ratings_of_item[item] >= min_count]
            if len(pairs) >= min_count:
                kept[user] = pairs
        if kept == histories:
            return kept
        histories = kept


# ---- Command line --------------------------------------------------------------------------------

def month(text: str) -> int:
    """The first second of a month, UTC: "1970-02" -> 2678400."""
    return calendar.timegm(time.strptime(text, "%Y-%m"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("category", help="its name on the host, like Industrial_and_Scientific")
    flag("--out", required=True, metavar="DIR", help="folder for items.jsonl and interactions.jsonl")
    flag("--year", type=int, choices=RELEASES, default=2018, help="release of the reviews")
    flag("--since", type=month, default=0, metavar="YYYY-MM", help="first month, UTC")
    flag("--until", type=month, default=math.inf, metavar="YYYY-MM", help="first month after, UTC")
    flag("--min-count", type=number(int, 1), default=5, help="ratings that each user and item needs")
    flag("--peers", action="store_true", help="as MiniOneRec: titles up to 20 words, repeats kept")
    flag("--cache", default="~/.cache/amazon_reviews", help="folder for the downloads")
    flag("--url", default=URL, help="host of the files, or a mirror with the same paths")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.since >= args.until:
        stop("--since must be before --until")
    release, out, cache = RELEASES[args.year], Path(args.out), Path(args.cache).expanduser()
    ratings = download(args.url, release["ratings"].format(args.category), cache)
    metadata = download(args.url, release["metadata"].format(args.category), cache)

    # The ratings are read twice, so that only those which may be in the k-core are held in memory.
    ratings_of_user, ratings_of_item = Counter(), Counter()
    for user, item_id, _ in read_ratings(ratings, release, args.since, args.until):
        ratings_of_user[user] += 1
        ratings_of_item[item_id] += 1
    frequent = {item_id for item_id, count in ratings_of_item.items() if count >= args.min_count}
    items = read_metadata(metadata, release, frequent, args.peers)
    histories = defaultdict(list)
    for user, item_id, when in read_ratings(ratings, release, args.since, args.until):
        if item_id in items and ratings_of_user[user] >= args.min_count:
            histories[user].append((when, item_id))
    if not args.peers:
        histories = {user: list(dict.fromkeys(pairs)) for user, pairs in histories.items()}

    users, known = [], set()
    for user, pairs in k_core(histories, args.min_count).items():
        pairs.sort(key=lambda pair: pair[0])            # equal times keep the order of the file
        times, bought = zip(*pairs)
        users.append({"user_id": user, "items": bought, "timestamps": times})
        known.update(bought)
    print(f"amazon {args.year} {args.category} | {ratings_of_user.total()} ratings in the window | "
          f"{args.min_count}-core: {len(users)} users, {len(known)} items, "
          f"{sum(len(user['items']) for user in users)} interactions")
    if not users:
        stop(f"{args.category}: nothing is left; choose a longer window or a lower --min-count")
    write_jsonl(out / "items.jsonl", [item for item_id, item in items.items() if item_id in known])
    write_jsonl(out / "interactions.jsonl", users)
    print(f"wrote {out}: items.jsonl, interactions.jsonl")


if __name__ == "__main__":
    main()
