"""Made-up visitors for a try, whose true probabilities are known: `headrace traffic` plays them."""

from collections.abc import Iterator

import numpy as np

from headrace.contract.project import Project
from headrace.examples.visits import Given, Visit, chance

USERS, ITEMS, SHOWN = 500, 60, 4


def visits(project: Project, seed: int) -> Iterator[Visit]:
    """Yield visits for ever: a user is shown a few items, and clicks by what the item is and what it costs."""
    random = np.random.default_rng(seed)
    liked, price = 1.2 * random.normal(size=ITEMS), random.uniform(1, 20, size=ITEMS).round(2)
    window_ms = project.tasks[0].window_ms
    while True:
        candidates, given, chances = [], [], []
        for place, item in enumerate(random.choice(ITEMS, size=SHOWN, replace=False).tolist()):
            candidates.append({"item_id": item, "price": float(price[item])})
            chances.append(chance(liked[item] - 0.1 * price[item]))
            if random.random() < chances[place]:
                delay_ms = int(random.uniform(0.02, 0.5) * window_ms)
                given.append(Given(feedback="click", delay_ms=delay_ms, place=place))
        user = int(random.integers(USERS))
        yield Visit(context={"user_id": user}, candidates=candidates, given=given, chances={"click": chances})
