"""Card payments: which of them come back as a chargeback, minutes or hours later.

The payment service logs its own transactions, whether anybody asked for a score or not, and logs nothing of the answer:
the join counts by itself what a card and a merchant did before.
"""

from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Bucket, Categorical, Counter, Cross, FeatureSpec, Mean, Numeric, Rate, Recency
from headrace.trainer.recipes import deepfm

HOUR_MS = 3_600_000

PROJECT = Project(
    name="fraud",
    impression=ImpressionType(
        tag="fraud.payment",
        key="card",
        fields={
            "card": "string",
            "merchant": "int64",
            "country": "string",
            "channel": "string",
            "amount": "float64",
            "is_new": "bool",
        },
    ),
    feedback=(FeedbackType(name="chargeback", tag="fraud.chargeback", fields={"merchant": "int64"}),),
    # Learnt as good at once, and corrected when a chargeback comes: a window of hours would hold everything back.
    tasks=(Task(name="chargeback", feedback="chargeback", window_ms=3 * HOUR_MS, policy="eager"),),
    features=FeatureSpec(
        counters=(
            Counter(
                name="card",
                key="card",
                counts=("impression", "sum:impression.amount", "last:impression"),
                window_ms=HOUR_MS,
                buckets=60,
            ),
            Counter(name="merchant", key="merchant", counts=("impression", "chargeback"), window_ms=6 * HOUR_MS),
        ),
        features=(
            Categorical(field="merchant"),
            Cross(fields=("country", "channel")),
            Categorical(field="is_new"),
            Bucket(field="amount", edges=(5.0, 20.0, 50.0, 100.0, 200.0, 500.0)),
            Bucket(field="counter.card.impression", edges=(1.0, 2.0, 4.0, 8.0)),
            Numeric(field="amount"),
            Mean(of="counter.card.sum:impression.amount", over="counter.card.impression", scale=0.01),
            Recency(of="counter.card.last:impression", half_life_ms=HOUR_MS // 12),
            Rate(of="counter.merchant.chargeback", over="counter.merchant.impression", prior=0.05, log_odds=True),
        ),
    ),
    # A chargeback takes back what its payment taught as a negative. Few ids, each seen often: rows may learn faster.
    recipe=deepfm(task="chargeback", lr_table=0.05, recent_base=True),
)
