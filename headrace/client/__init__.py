"""What a web service imports to ask for scores and to log what it showed. It imports neither torch nor pyarrow.

    from headrace.client import Client
    from headrace.sender import Sender

    client = Client("http://127.0.0.1:8080", sender=Sender("store", spool_dir="/var/spool/store"))
    answer = client.rank({"user_id": 7}, [{"item_id": 9, "price": 3.5}, {"item_id": 10, "price": 2.0}], timeout_ms=200)
    best = answer.order()[:1]
    client.shown(answer, best)

`AsyncClient` does the same with `await`. Both stand on the standard library (`http.client`, asyncio's streams): httpx
would bring five packages and twice the import for one POST over a kept connection.
"""

from headrace.client.answer import Answer
from headrace.client.async_client import AsyncClient
from headrace.client.attempts import TooLate
from headrace.client.client import Client
from headrace.contract.errors import BadRequest, Overloaded, Unavailable

__all__ = ["Answer", "AsyncClient", "BadRequest", "Client", "Overloaded", "TooLate", "Unavailable"]
