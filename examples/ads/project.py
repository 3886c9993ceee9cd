"""Ads on pages of many publishers: who clicks within half a minute, and who buys within five, for how much.

A request shows several ads to one cookie, of which only a keyed hash is stored: HEADRACE_PRIVACY_KEY has the key, a
secret of 16 bytes at least, the same for every gateway and serving process.
"""

from headrace.contract.project import FeedbackType, FieldType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, Cross, FeatureSpec, MultiValued, Numeric, Rate, TimePart
from headrace.trainer.recipes import multitask

SECOND_MS, MINUTE_MS, HOUR_MS = 1_000, 60_000, 3_600_000
AD: dict[str, FieldType] = {"campaign": "int64", "publisher": "string", "device": "string"}

PROJECT = Project(
    name="ads",
    impression=ImpressionType(
        tag="ads.impression",
        key="cookie",
        fields={"cookie": "string", **AD, "keywords": "list[string]", "bid": "float64"},
        private={"cookie": "hash"},
    ),
    feedback=(
        FeedbackType(name="click", tag="ads.click", fields={"cookie": "string", **AD}, private={"cookie": "hash"}),
        # What was paid is the event's `value`.
        FeedbackType(
            name="conversion", tag="ads.conversion", fields={"cookie": "string", **AD}, private={"cookie": "hash"}
        ),
    ),
    tasks=(
        Task(name="click", feedback="click", window_ms=30 * SECOND_MS),
        # Known after five minutes; whoever buys within half an hour corrects what was learnt then.
        Task(name="conversion", feedback="conversion", window_ms=5 * MINUTE_MS, correct_ms=25 * MINUTE_MS),
    ),
    features=FeatureSpec(
        counters=(
            Counter(
                name="campaign",
                key="campaign",
                counts=("impression", "click", "conversion", "sum:conversion.value"),
                window_ms=HOUR_MS,
            ),
            Counter(name="spot", key=("publisher", "device"), counts=("impression", "click"), window_ms=HOUR_MS),
            Counter(name="cookie", key="cookie", counts=("impression", "click"), window_ms=HOUR_MS),
        ),
        features=(
            Categorical(field="campaign"),
            Cross(fields=("publisher", "device")),
            MultiValued(field="keywords", values_max=4),
            TimePart(part="hour"),
            Numeric(field="bid"),
            Rate(of="counter.campaign.click", over="counter.campaign.impression", log_odds=True),
            Rate(of="counter.campaign.conversion", over="counter.campaign.click", log_odds=True),
            Rate(of="counter.spot.click", over="counter.spot.impression", log_odds=True),
            Rate(of="counter.cookie.click", over="counter.cookie.impression", log_odds=True),
        ),
    ),
    recipe=multitask(("click", "conversion")),
)
