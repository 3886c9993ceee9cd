"""The demo shop's project: what a user of Headrace writes. Events, label, features and recipe; data only, no I/O.

Names are those of KuaiRand's tables. Columns that are known only afterwards (play time, likes, ...) are not declared,
so that no stage can take one for a feature.
"""

from __future__ import annotations

from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.contract.project import FeedbackType, FieldType, ImpressionType, Project, Task
from headrace.contract.spec import Bucket, Categorical, Counter, FeatureSpec, Numeric, Product, Rate
from headrace.trainer.recipes import dcn

REQUEST: dict[str, FieldType] = {
    "user_id": "int64",
    "video_id": "int64",
    "time_ms": "int64",
    "hourmin": "int64",
    "tab": "int64",
    "duration_ms": "int64",
}
"""Of the request itself; `time_ms` is when the row was logged originally, the event's own time is the demo's now."""

USER: dict[str, FieldType] = {
    "user_active_degree": "string",
    "follow_user_num_range": "string",
    "fans_user_num_range": "string",
    "friend_user_num_range": "string",
    "register_days": "int64",
    "onehot_feat1": "int64",
    "onehot_feat2": "int64",
    "onehot_feat3": "int64",
    "onehot_feat8": "int64",
    "onehot_feat9": "int64",
}
"""Of the user's profile."""

VIDEO: dict[str, FieldType] = {
    "author_id": "int64",
    "video_type": "string",
    "upload_type": "string",
    "music_id": "int64",
    "tag": "string",
}
"""Of the catalogue."""

CLICK: dict[str, FieldType] = {"video_id": "int64", "author_id": "int64", "tab": "int64"}
"""What a click carries besides the partition key: the keys of the counters that count it."""

WATCHED_MS = (1_000, 3_000, 7_000, 15_000, 30_000)
DWELL: dict[str, FieldType] = {
    "video_id": "int64",
    "author_id": "int64",
    **{f"over_{ms}": "int64" for ms in WATCHED_MS},
    "long_view": "int64",
    "share": "float64",
}
"""What a dwell tells when the visitor leaves a video, besides its `value` in seconds: whether it was watched for
longer than so many milliseconds, whether that is a long view (each 0 or 1), and half the share of its length, 1 at
most. Counters sum these over earlier videos; what is shown now has none yet."""

CATALOGUE = Crawl(
    name="catalogue",
    kind="json",
    # The site that `headrace shop` serves. A shelf holds a hundred videos; the sitemap says which shelves have changed.
    sitemaps=("http://127.0.0.1:$PORT_CATALOGUE/sitemap.xml",),
    follow=(Follow(url=r"/shelf/\d+\.json$"),),
    rows="items",
    joins="video_id",
    key=Extract(at="id", type="int64"),
    fields={"music": Extract(at="music"), "price": Extract(at="price", type="float64")},
    every_ms=15_000,
    delay_ms=50,
)
"""What no log line carries: the kind of a video's sound, which the model learns, and a price that moves."""

RATES = {"user": 10.0, "video": 10.0, "author": 10.0, "user_tab": 3.0}
"""Counters whose clicks an impression are features, and how many impressions of the usual rate each begins with."""

WATCHED = {**{f"sum:dwell.over_{ms}": 3.0 for ms in WATCHED_MS}, "sum:dwell.long_view": 10.0, "sum:dwell.share": 10.0}
"""What dwells told of how a user watched earlier videos, likewise."""

COUNTERS = (
    Counter(name="user", key="user_id"),
    Counter(name="video", key="video_id"),
    Counter(name="author", key="author_id"),
    Counter(name="user_tab", key=("user_id", "tab")),
    Counter(name="watched", key="user_id", counts=tuple(WATCHED)),
)

DURATION = Bucket(field="duration_ms", edges=(5e3, 7e3, 1e4, 1.5e4, 2e4, 3e4, 4.5e4, 6e4, 9e4, 1.2e5, 1.8e5, 3e5))


def rate(of: str, over: str, strength: float, prior: float = 0.45) -> Rate:
    """Return a rate on the scale of the model's sum."""
    over = f"counter.{over}.impression"
    return Rate(of=f"counter.{of}", over=over, prior=prior, strength=strength, log_odds=True)


FEATURES = FeatureSpec(
    counters=COUNTERS,
    features=(
        *(Categorical(field=name) for name in ("user_id", "video_id", "author_id", "tab", "tag", "upload_type")),
        *(Categorical(field=name) for name in ("user_active_degree", *(f"onehot_feat{i}" for i in (1, 2, 3, 8, 9)))),
        Categorical(field="external.catalogue.music"),
        DURATION,
        Product(parts=(Categorical(field="tab"), DURATION), values_max=1),
        Numeric(field="duration_ms", scale=0.1),
        *(rate(f"{name}.click", name, strength) for name, strength in RATES.items()),
        *(rate(f"watched.{e}", "user", s, 0.45 if ".over_" in e else 0.3) for e, s in WATCHED.items()),
    ),
)
"""What paid on KuaiRand's rows in the order and with the delays of this shop; the other groups of
bench/harness/quality_rows.py brought 0.0002 AUC and less here. Few on purpose: in a stream seen once, sparse crosses
learn the order of arrival."""

PROJECT = Project(
    name="shop",
    impression=ImpressionType(tag="shop.impression", key="user_id", fields={**REQUEST, **USER, **VIDEO}),
    feedback=(
        FeedbackType(name="click", tag="shop.click", fields=CLICK),
        FeedbackType(name="dwell", tag="shop.dwell", fields=DWELL),
    ),
    # Clicks come within 0.7 s. A longer window delays the negatives alone, and a model in a hurry learns that.
    tasks=(Task(name="click", feedback="click", window_ms=2_000),),
    crawls=(CATALOGUE,),
    features=FEATURES,
    # What did best in bench/quality.py. Steps come every 50 ms whatever they hold, so the dense weights learn slower.
    recipe=dcn(lr_table=0.01, lr_dense=0.001, hidden=(128,), dense_average=0.995),
).checked()
