"""Made-up card payments for a try, whose true probabilities are known: `headrace traffic` plays them."""

from collections.abc import Iterator

import numpy as np

from headrace.contract.project import Project
from headrace.examples.visits import Given, Visit, chance

CARDS, MERCHANTS = 1_500, 60
COUNTRIES, CHANNELS = ("at", "de", "fr", "it", "pl"), ("chip", "phone", "web")


def visits(project: Project, seed: int) -> Iterator[Visit]:
    """Yield payments for ever. Merchant, country by channel, size and a new card say which come back.

    As many come back as their chances add up to (systematic sampling), so that a model's calibration tells of the model
    and not of luck: among 1,500 independent draws luck alone is 2.5 %, as one standard deviation.
    """
    random = np.random.default_rng(seed)
    merchant_effect = 1.2 * random.normal(size=MERCHANTS)
    way_effect = 0.8 * random.normal(size=(len(COUNTRIES), len(CHANNELS)))
    home = random.integers(len(COUNTRIES), size=CARDS)
    window_ms = project.tasks[0].window_ms
    due, chances = float(random.random()), 0.0
    while True:
        card, merchant = int(random.integers(CARDS)), int(random.integers(MERCHANTS))
        country, channel = int(home[card]), int(random.integers(len(CHANNELS)))
        amount, is_new = round(float(random.lognormal(3.5, 1.0)), 2), bool(random.random() < 0.1)
        logit = -3.0 + merchant_effect[merchant] + way_effect[country, channel]
        fraud = chance(logit + 1.2 * is_new + 0.8 * (amount > 100))
        given = []
        chances += fraud
        if chances >= due:
            due += 1
            # Minutes to hours: half of them within a tenth of the window.
            late = min(0.95, float(random.exponential(0.15)) + 0.01)
            given.append(Given(feedback="chargeback", delay_ms=int(late * window_ms)))
        payment = {
            "merchant": merchant,
            "country": COUNTRIES[country],
            "channel": CHANNELS[channel],
            "amount": amount,
            "is_new": is_new,
        }
        yield Visit(
            context={"card": f"card-{card}"},
            candidates=[payment],
            given=given,
            chances={"chargeback": [fraud]},
            logs_answer=False,
        )
