"""What the store logs, what is learnt of it, and from which features."""

from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, Cross, FeatureSpec, Numeric, Rate
from headrace.trainer.recipes import deepfm

PROJECT = Project(
    name="store",
    impression=ImpressionType(
        tag="store.impression", key="user_id", fields={"user_id": "int64", "item_id": "int64", "price": "float64"}
    ),
    feedback=(FeedbackType(name="click", tag="store.click", fields={"item_id": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(
        counters=(Counter(name="item", key="item_id", counts=("impression", "click"), window_ms=3_600_000),),
        features=(
            Categorical(field="item_id"),
            Cross(fields=("user_id", "item_id")),
            Numeric(field="price"),
            Rate(of="counter.item.click", over="counter.item.impression"),
        ),
    ),
    recipe=deepfm(dim=8, hidden=(64, 32)),
)
