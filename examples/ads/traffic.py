"""Made-up pages with ads for a try, whose true probabilities are known: `headrace traffic` plays them."""

from collections.abc import Iterator

import numpy as np

from headrace.contract.project import Project
from headrace.examples.visits import Given, Visit, chance

COOKIES, CAMPAIGNS, PUBLISHERS, WORDS, SHOWN = 2_000, 20, 8, 16, 4
DEVICES = ("phone", "tablet", "desktop")
LATE = 0.1
"""Share of buyers who take longer than the conversion's window, and correct what was learnt."""


def visits(project: Project, seed: int) -> Iterator[Visit]:
    """Yield pages for ever: each shows some ads, whose campaign, place and words say who clicks, and whose campaign
    and words say which click becomes a conversion.

    As many click and buy as their chances add up to (systematic sampling), so that a model's calibration tells of the
    model and not of luck: among 3,000 independent draws luck alone is 1.8 %, as one standard deviation.
    """
    random = np.random.default_rng(seed)
    liked, bought = 1.1 * random.normal(size=CAMPAIGNS), 1.5 * random.normal(size=CAMPAIGNS)
    spot, word = 0.6 * random.normal(size=(PUBLISHERS, len(DEVICES))), 0.5 * random.normal(size=(2, WORDS))
    bid = random.uniform(0.1, 2.0, size=CAMPAIGNS).round(2)
    clicked, converted = project.tasks
    due, chances = random.random(2), np.zeros(2)

    def comes(which: int, chance: float) -> bool:
        chances[which] += chance
        is_due = bool(chances[which] >= due[which])
        due[which] += is_due
        return is_due

    while True:
        publisher, device = int(random.integers(PUBLISHERS)), int(random.integers(len(DEVICES)))
        context = {
            "cookie": f"visitor-{random.integers(COOKIES)}",
            "publisher": f"site-{publisher}",
            "device": DEVICES[device],
        }
        candidates, given, clicks, sales = [], [], list[float](), list[float]()
        for place, campaign in enumerate(random.choice(CAMPAIGNS, size=SHOWN, replace=False).tolist()):
            words = random.choice(WORDS, size=random.integers(1, 4), replace=False)
            keywords = [f"word-{each}" for each in words.tolist()]
            candidates.append({"campaign": campaign, "keywords": keywords, "bid": float(bid[campaign])})
            click = chance(-1.2 + liked[campaign] + spot[publisher, device] + word[0, words].sum())
            buy = chance(0.2 + bought[campaign] + word[1, words].sum())
            clicks.append(click)
            sales.append(click * buy)
            if not comes(0, click):
                continue
            delay_ms = int(random.uniform(0.02, 0.9) * clicked.window_ms)
            given.append(Given(feedback="click", delay_ms=delay_ms, place=place))
            if comes(1, buy):
                # It comes after its click.
                late_ms = converted.window_ms + int(random.uniform(0.0, 0.9) * converted.correct_ms)
                soon_ms = delay_ms + int(random.uniform(0.02, 0.8) * converted.window_ms)
                money = {"value": round(float(random.lognormal(3.0, 0.5)), 2)}
                delay_ms = late_ms if random.random() < LATE else soon_ms
                given.append(Given(feedback="conversion", delay_ms=delay_ms, place=place, fields=money))
        true = {"click": clicks, "conversion": sales}
        yield Visit(context=context, candidates=candidates, given=given, chances=true)
