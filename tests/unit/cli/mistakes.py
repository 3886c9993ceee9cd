"""Mistakes that a user makes in a project's two files and its environment, and what must be said of each.

Each is a change of a sound project. What is said must hold every one of `words`, regular expressions: where (a file
with its line, or a field) and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PROJECT = """\
from headrace.contract.functions import feature_function
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, Custom, FeatureSpec, Numeric, Rate
from headrace.trainer.recipes import deepfm

PROJECT = Project(
    name="store",
    impression=ImpressionType(
        tag="store.impression",
        key="user_id",
        fields={"user_id": "int64", "item_id": "int64", "price": "float64"},
    ),
    feedback=(FeedbackType(name="click", tag="store.click", fields={"item_id": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(
        counters=(Counter(name="item", key="item_id"),),
        features=(
            Categorical(field="item_id"),
            Numeric(field="price"),
            Rate(of="counter.item.click", over="counter.item.impression"),
        ),
    ),
    recipe=deepfm(dim=8),
)
"""
FUNCTION = """
@feature_function("half", version=1)
def half(price):
    {}


PROJECT ="""
CUSTOM = 'Custom(function="half", version=1, fields=("price",), gives="numbers"),\n            Numeric('


class Mistake(NamedTuple):
    """One mistake: what is replaced in the sound project, what else the folder and the environment have."""

    name: str
    words: tuple[str, ...]
    change: Mapping[str, str] = {}
    """Text of project.py -> what stands there instead."""
    toml: str | bytes = ""
    files: Mapping[str, str | bytes] = {}
    env: Mapping[str, str] = {}
    without: tuple[str, ...] = ()
    """Files that the folder lacks."""
    flags: tuple[str, ...] = ()


def own(body: str) -> dict[str, str]:
    """Return the change that gives the project a feature function with this body."""
    return {"\nPROJECT =": FUNCTION.format(body), "Numeric(": CUSTOM}


AT = r"project\.py, line {}\b"
TOML_AT = r"headrace\.toml, line {}\b"

PYTHON = (
    Mistake(
        "a bracket is missing",
        (AT.format(6), "SyntaxError", "never closed", "bracket"),
        {"),\n    feedback": ",\n    feedback"},
    ),
    Mistake("a quote is missing", (AT.format(7), "SyntaxError", "quote"), {'name="store"': 'name="store'}),
    Mistake("a comma is missing", (AT.format(7), "comma"), {'name="store",': 'name="store"'}),
    Mistake(
        "tabs among spaces",
        (AT.format(8), "Indent with spaces"),
        {"\nPROJECT =": "\nif True:\n        a = 1\n\tb = 2\nPROJECT ="},
    ),
    Mistake(
        "a package that is not there",
        (AT.format(1), "no_such_package", "pip install no_such_package"),
        {"from headrace.contract.functions": "import no_such_package\nfrom headrace.contract.functions"},
    ),
    Mistake(
        "a misspelt module of ours",
        (AT.format(2), "headrace.contract.projekt", "mean 'headrace.contract.project'"),
        {"contract.project ": "contract.projekt "},
    ),
    Mistake(
        "a misspelt import",
        (AT.format(3), "mean 'Categorical'"),
        {"import Categorical": "import Categorial, Categorical"},
    ),
    Mistake(
        "a name without its import", (AT.format(23), "NameError", "mean 'deepfm'"), {"recipe=deepfm(": "recipe=deepfn("}
    ),
    Mistake("a misspelt argument", (AT.format(14), "'window'", "mean 'window_ms'"), {"window_ms": "window"}),
    Mistake("a misspelt argument of a recipe", (AT.format(23), "'dims'", "mean 'dim'"), {"dim=8": "dims=8"}),
    Mistake("an argument is missing", (AT.format(8), "'key'", "Add key="), {'        key="user_id",\n': ""}),
    Mistake(
        "an own module that fails",
        (r"helper\.py, line 2", r"imported by project\.py, line 1", "ZeroDivisionError", "Correct this line"),
        {"from headrace.contract.functions": "import helper\nfrom headrace.contract.functions"},
        files={"helper.py": "A = 0\nB = 1 / A\n"},
    ),
    Mistake(
        "an own module with wrong syntax",
        (r"helper2\.py, line 2", "SyntaxError", "Correct this line"),
        {"from headrace.contract.functions": "import helper2\nfrom headrace.contract.functions"},
        files={"helper2.py": "A = 0\nB = (\n"},
    ),
    Mistake(
        "the file ends the process",
        (AT.format(2), "must not end the process"),
        {"from headrace.contract.functions": "import sys\nsys.exit(3)\nfrom headrace.contract.functions"},
    ),
    Mistake(
        "a data file that is not there",
        (AT.format(6), "items.csv", "give a path"),
        {"\nPROJECT =": "\nopen('items.csv')\nPROJECT ="},
    ),
    Mistake(
        "not UTF-8",
        (r"project\.py", "utf-8|UTF-8"),
        files={"project.py": PROJECT.replace('"store"', '"caf\xe9"').encode("latin-1")},
    ),
    Mistake("no PROJECT", ("project\\.py", 'object = "STORE"'), {"\nPROJECT =": "\nSTORE ="}),
    Mistake("an empty file", ("project\\.py", "declares none", "PROJECT = Project"), files={"project.py": ""}),
    Mistake(
        "no project.py",
        ("project\\.py", "is no Python file", 'module = "other\\.py"'),
        without=("project.py",),
        files={"other.py": PROJECT},
    ),
    Mistake("no headrace.toml", (r"headrace\.toml does not exist", "touch"), without=("headrace.toml",)),
    Mistake(
        "project.py is a folder",
        ("project\\.py", "is no Python file"),
        without=("project.py",),
        files={"project.py/x": ""},
    ),
)
"""Of Python."""

DECLARED = (
    Mistake("the key is no field", (AT.format(10), "'usr_id'", "mean 'user_id'"), {'key="user_id"': 'key="usr_id"'}),
    Mistake(
        "an unknown type", (AT.format(11), r"fields\['price'\]", "'float'", "mean 'float64'"), {'"float64"': '"float"'}
    ),
    Mistake(
        "an unknown field in a feature",
        (AT.format(19), "'prise'", "mean 'price'"),
        {'Numeric(field="price")': 'Numeric(field="prise")'},
    ),
    Mistake(
        "a feature of another type",
        (AT.format(11) + "|" + AT.format(19), "'price'", "string"),
        {'"price": "float64"': '"price": "string"'},
    ),
    Mistake(
        "a counter of a field that feedback lacks",
        (AT.format(16), "'item_id' is not a field of 'click'", "Declare"),
        {', fields={"item_id": "int64"})': ")"},
    ),
    Mistake(
        "a counter of an unknown event",
        (AT.format(16), "'klick'", "mean 'click'"),
        {'key="item_id")': 'key="item_id", counts=("impression", "klick"))'},
    ),
    Mistake(
        "a column that no counter has",
        (AT.format(20), r"counter\.items\.click", r"mean 'counter\.item\.click'"),
        {"counter.item.click": "counter.items.click"},
    ),
    Mistake(
        "a window of 0",
        (AT.format(14), r"tasks\[0\]\.window_ms", "is 0", "> 0|>= 1"),
        {"window_ms=10_000": "window_ms=0"},
    ),
    Mistake(
        "a window as text",
        (AT.format(14), r"tasks\[0\]\.window_ms", "'10s'", "a whole number"),
        {"window_ms=10_000": 'window_ms="10s"'},
    ),
    Mistake(
        "a window of seconds and a half",
        (AT.format(14), "1.5", "a whole number"),
        {"window_ms=10_000": "window_ms=1.5"},
    ),
    Mistake(
        "a tuple without its comma",
        (AT.format(16), "counts", "ends in a comma"),
        {'key="item_id")': 'key="item_id", counts=("click"))'},
    ),
    Mistake(
        "one task that is no tuple", (AT.format(14), "tasks", "a tuple"), {"window_ms=10_000),)": "window_ms=10_000))"}
    ),
    Mistake(
        "a feature as text",
        (AT.format(18), r"features\[0\]", "'item_id'", "a declaration such as"),
        {'Categorical(field="item_id")': '"item_id"'},
    ),
    Mistake(
        "a task of undeclared feedback",
        (AT.format(14), "'order'", "there are: 'click'", "FeedbackType"),
        {'feedback="click", window': 'feedback="order", window'},
    ),
    Mistake(
        "two tasks of one name",
        ("tasks 'click' and 'click' are one", "another name"),
        {"window_ms=10_000),": 'window_ms=10_000), Task(name="click", feedback="click", window_ms=5),'},
    ),
    Mistake(
        "two counters of one name",
        ("counters 'item' and 'item'", "another name"),
        {'key="item_id"),)': 'key="item_id"), Counter(name="item", key="item_id"))'},
    ),
    Mistake(
        "two names that differ by case",
        ("'price' and 'Price'", "another name"),
        {'"price": "float64"}': '"price": "float64", "Price": "float64"}'},
    ),
    Mistake("one tag twice", ("tags", "store.impression", "another name"), {"store.click": "store.impression"}),
    Mistake(
        "a reserved name",
        (AT.format(11), "'label'", "my_label"),
        {'"price": "float64"}': '"price": "float64", "label": "int64"}'},
    ),
    Mistake("a name with spaces", (AT.format(7), "'My Store'", "a-z"), {'name="store"': 'name="My Store"'}),
    Mistake(
        "an empty field name",
        (AT.format(11), "field ''", "is empty"),
        {'"price": "float64"}': '"price": "float64", "": "int64"}'},
    ),
    Mistake(
        "a recipe that is not called",
        (AT.format(23), "recipe", r"call it: deepfm\(\.\.\.\)"),
        {"deepfm(dim=8)": "deepfm"},
    ),
    Mistake("a recipe as text", (AT.format(23), "recipe", "'deepfm'", "a declaration"), {"deepfm(dim=8)": '"deepfm"'}),
    Mistake(
        "a recipe of an undeclared task",
        (AT.format(23), "'order'", "deepfm\\(task='click'\\)"),
        {"dim=8": 'task="order"'},
    ),
    Mistake("a negative dimension", (AT.format(23), "recipe.dim", "-8", ">= 0"), {"dim=8": "dim=-8"}),
    Mistake("a function nobody declared", (AT.format(19), "'half'", "@feature_function"), {"Numeric(": CUSTOM}),
    Mistake(
        "an own function that raises",
        (AT.format(8), AT.format(24), "IndexError", "Every input is legal"),
        own("return {}[price[0].as_py()]"),
    ),
    Mistake("an own function of another length", (AT.format(24), "'half'", "one value a row"), own("return price[:1]")),
    Mistake(
        "an own function that returns no array",
        (AT.format(24), "'half'", "must return an Arrow or NumPy array"),
        own("return 5"),
    ),
    Mistake(
        "an own function that looks at other rows",
        (AT.format(24), "looks at more than its row"),
        own(
            "import pyarrow.compute as pc; return pc.cumulative_sum(pc.fill_null(pc.min_element_wise(price, 1.0), 0.0))"
        ),
    ),
    Mistake(
        "a key that is not there",
        (AT.format(11), "HEADRACE_PRIVACY_KEY", "has 0 bytes", "export"),
        {
            '"user_id": "int64", ': '"user_id": "string", ',
            '"price": "float64"},': '"price": "float64"}, private={"user_id": "hash"},',
            ', fields={"item_id": "int64"})': ', fields={"user_id": "string", "item_id": "int64"}, **HASHED)',
            "\nPROJECT =": 'HASHED = {"private": {"user_id": "hash"}}\nPROJECT =',
        },
    ),
    Mistake(
        "a key that is too short",
        (AT.format(11), "has 3 bytes", "16 bytes"),
        {
            '"user_id": "int64", ': '"user_id": "string", ',
            '"price": "float64"},': '"price": "float64"}, private={"user_id": "hash"},',
            ', fields={"item_id": "int64"})': ', fields={"user_id": "string", "item_id": "int64"}, **HASHED)',
            "\nPROJECT =": 'HASHED = {"private": {"user_id": "hash"}}\nPROJECT =',
        },
        env={"HEADRACE_PRIVACY_KEY": "abc"},
    ),
    Mistake(
        "a private field that is a number",
        ("'user_id'", 'declare it as "string"'),
        {'"price": "float64"},': '"price": "float64"}, private={"user_id": "hash"},'},
    ),
)
"""Of what is declared."""

SETTINGS = (
    Mistake("a misspelt option", (TOML_AT.format(2), "'batch_mz'", "mean 'batch_ms'"), toml="[ingest]\nbatch_mz = 5\n"),
    Mistake("a misspelt table", (TOML_AT.format(1), "'ingset'", "mean 'ingest'"), toml="[ingset]\nbatch_ms = 5\n"),
    Mistake(
        "an option outside its table", (TOML_AT.format(1), "'batch_ms'", "docs/settings.md"), toml="batch_ms = 5\n"
    ),
    Mistake(
        "a negative number",
        (TOML_AT.format(3), r"log\.partitions", "a whole number >= 1|> 0"),
        toml="# mine\n[log]\npartitions = -1\n",
    ),
    Mistake(
        "a number as text",
        (TOML_AT.format(2), r"ingest\.batch_ms", "a whole number"),
        toml='[ingest]\nbatch_ms = "5"\n',
    ),
    Mistake("no TOML", (TOML_AT.format(2), "is not TOML", "NAME = VALUE"), toml="[ingest]\nbatch_ms: 5\n"),
    Mistake(
        "one key twice", (TOML_AT.format(3), "is not TOML", "overwrite"), toml="[ingest]\nbatch_ms = 5\nbatch_ms = 6\n"
    ),
    Mistake(
        "settings that are not UTF-8",
        (TOML_AT.format(2), "Save the file as UTF-8"),
        toml=b"[crawl]\nuser_agent = 'caf\xe9'\n",
    ),
    Mistake("an unknown choice", (TOML_AT.format(2), r"train\.device", "'gpu'"), toml='[train]\ndevice = "gpu"\n'),
    Mistake(
        "a source without a tag",
        (r"headrace\.toml", "needs tag or tag_field"),
        toml='[[ingest.sources]]\ntopic = "t"\n',
    ),
    Mistake("a slice of no field", (r"headrace\.toml", "'city'", "no field"), toml='[train]\nslices = ["city"]\n'),
    Mistake(
        "a module that is not there",
        (r"headrace\.toml", "'shop.py'", 'module = "project.py"'),
        toml='module = "shop.py"\n',
    ),
    Mistake("a port out of range", ("PORT_BASE", "70000", "from 1024"), env={"PORT_BASE": "70000"}),
    Mistake("a port that is no number", ("PORT_BASE", "'many'", "a number"), env={"PORT_BASE": "many"}),
    Mistake("a negative rate", ("--rate -5", "above 0"), flags=("--rate", "-5")),
    Mistake("more than may wait", ("join.pending_max", "raise it"), toml="[join]\npending_max = 10\n"),
)
"""Of settings and environment."""

SEVERAL = (
    Mistake(
        "two features and a window",
        (AT.format(14) + ".*'10s'", AT.format(18) + ".*'itm'", AT.format(19) + ".*'prise'"),
        {
            "window_ms=10_000": 'window_ms="10s"',
            'al(field="item_id")': 'al(field="itm")',
            'field="price"': 'field="prise"',
        },
    ),
    Mistake(
        "two types and a feature that reads neither",
        (AT.format(11) + ".*'float'", AT.format(11) + ".*'int'", AT.format(18) + ".*'itm'"),
        {
            '"price": "float64"': '"price": "float"',
            '"item_id": "int64", "price"': '"item_id": "int", "price"',
            'al(field="item_id")': 'al(field="itm")',
        },
    ),
    Mistake(
        "the key, a task and a counter",
        (AT.format(10) + ".*'usr_id'", AT.format(14) + ".*'order'", AT.format(16) + ".*'itemid'.*mean 'item_id'"),
        {
            'key="user_id"': 'key="usr_id"',
            'feedback="click", window': 'feedback="order", window',
            'key="item_id"': 'key="itemid"',
        },
    ),
    Mistake(
        "a reserved name and one name twice",
        (AT.format(11) + ".*'label'", "tasks 'click' and 'click' are one"),
        {
            '"price": "float64"}': '"price": "float64", "label": "int64"}',
            "window_ms=10_000),": 'window_ms=10_000), Task(name="click", feedback="click", window_ms=5),',
        },
    ),
    Mistake(
        "two imports are missing",
        (AT.format(18) + ".*'Categorical'", AT.format(20) + ".*'Rate'", "from headrace.contract.spec import Rate"),
        {"import Categorical, Counter": "import Counter", "Numeric, Rate": "Numeric"},
    ),
    Mistake(
        "three misspelt arguments",
        (AT.format(14) + ".*'window'", AT.format(16) + ".*'keys'.*mean 'key'", AT.format(19) + ".*'fld'"),
        {"window_ms": "window", 'key="item_id")': 'keys="item_id")', 'Numeric(field="price")': 'Numeric(fld="price")'},
    ),
    Mistake(
        "two settings and a table",
        (
            TOML_AT.format(2) + ".*'batch_mz'",
            TOML_AT.format(3) + r".*ingest\.batch_rows",
            TOML_AT.format(4) + ".*'lgo'",
        ),
        toml='[ingest]\nbatch_mz = 5\nbatch_rows = "many"\n[lgo]\npartitions = 2\n',
    ),
    Mistake(
        "a setting and a declaration",
        (TOML_AT.format(2) + ".*'batch_mz'", AT.format(19) + ".*'prise'"),
        {'field="price"': 'field="prise"'},
        toml="[ingest]\nbatch_mz = 5\n",
    ),
)
"""Two or three at once: each is told, in one go."""

MORE = (
    Mistake(
        "a key that feedback leaves plain",
        (AT.format(13), "'store.impression' hashes the partition key 'user_id' and 'store.click' does not", "of both"),
        {
            '"user_id": "int64", ': '"user_id": "string", ',
            '"price": "float64"},': '"price": "float64"}, private={"user_id": "hash"},',
        },
    ),
    Mistake(
        "an error that is no Exception",
        (AT.format(6), "BaseException", "Correct this line"),
        {"\nPROJECT =": "\nraise BaseException\nPROJECT ="},
    ),
    Mistake(
        "the file imports itself",
        (AT.format(1), "ImportError", "imports itself"),
        {"from headrace.contract.functions": "from project import NAME\nfrom headrace.contract.functions"},
    ),
    Mistake(
        "a file that Python's own module hides",
        (AT.format(2), r"queue\.py beside project\.py is not read", "another name"),
        {"from headrace.contract.functions": "import queue\nN = queue.MINE\nfrom headrace.contract.functions"},
        files={"queue.py": "MINE = 3\n"},
    ),
    Mistake(
        "a relative import",
        (AT.format(1), "without the dot"),
        {"from headrace.contract.functions": "from .consts import A\nfrom headrace.contract.functions"},
        files={"consts.py": "A = 1\n"},
    ),
    Mistake(
        "UTF-16",
        (AT.format(1), "Save the file as UTF-8"),
        files={"project.py": PROJECT.encode("utf-16")},
    ),
    Mistake(
        "exit without a number",
        (AT.format(6), r"SystemExit\.\n", "Take the exit out"),
        {"\nPROJECT =": "\nexit()\nPROJECT ="},
    ),
    Mistake("an empty tag", (AT.format(13), r"feedback\[0\]\.tag", "is empty"), {'tag="store.click"': 'tag=""'}),
    Mistake(
        "a tag with a space", (AT.format(13), "'store click'", "a space"), {'tag="store.click"': 'tag="store click"'}
    ),
    Mistake("a name that no file may have", (AT.format(7), "64 at most"), {'name="store"': f'name="{"s" * 300}"'}),
    Mistake(
        "a long field",
        (AT.format(11), "has 300 letters, 200 at most"),
        {'"price": "float64"': f'"{"p" * 300}": "float64"'},
    ),
    Mistake(
        "a type of Python",
        (AT.format(11), r"fields\['item_id'\] is Python's type int: write \"int64\""),
        {'"item_id": "int64", "price"': '"item_id": int, "price"'},
    ),
    Mistake(
        "an argument without its name",
        (AT.format(19), "Name each argument"),
        {'Numeric(field="price")': 'Numeric("price")'},
    ),
    Mistake(
        "a recipe of tasks that are not declared",
        (AT.format(23), r"'click2', 'like' are no declared tasks.*deepfm\(task='click'\)"),
        {"dim=8": 'dim=8, task="click2", tasks=("click2", "like")'},
    ),
    Mistake(
        "a counter over a list",
        (AT.format(16), "over 'tags', a list", "name another field"),
        {'"price": "float64"}': '"price": "float64", "tags": "list[string]"}', 'key="item_id")': 'key="tags")'},
    ),
    Mistake(
        "a value where a table belongs", (TOML_AT.format(1), r"serve is a table: write \[serve\]"), toml="serve = 3\n"
    ),
)
"""What a user of an own project met."""
