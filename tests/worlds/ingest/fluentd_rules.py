"""fluentd's configuration by fluentd's own rules: how it reads the text, and what each value of each key means.

Ported from what fluentd 1.16 to 1.19 do, not from their words: `lib/fluent/config/v1_parser.rb` (sections, quoted
values, `#{...}`), `config/types.rb` (sizes, times, booleans) and the `config_param`s of the plugins that our files
name; kafka2 from fluent-plugin-kafka 0.19. A unit that fluentd does not know is not refused by it: `100ms` is 6,000
seconds. So `meaning` refuses what a person reads in another way than fluentd does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SIZES = (("k", 1 << 10), ("m", 1 << 20), ("g", 1 << 30), ("t", 1 << 40))
_TIMES = (("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400))

Value = str | int | float | bool


@dataclass
class Section:
    """`<name argument>` and what is in it; the file as a whole is a section without a name."""

    name: str
    argument: str = ""
    values: dict[str, str] = field(default_factory=dict)
    children: list[Section] = field(default_factory=list)

    def all(self, name: str) -> list[Section]:
        """Return the sections of this name, at any depth."""
        found = [child for child in self.children if child.name == name]
        return found + [deeper for child in self.children for deeper in child.all(name)]


def parse(text: str) -> Section:
    """Return what fluentd reads of a file. Raises `ValueError` on what it would refuse."""
    open_sections = [Section("")]
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        if closed := re.fullmatch(r"</([\w-]+)>", words):
            if len(open_sections) == 1 or open_sections.pop().name != closed[1]:
                raise ValueError(f"line {number}: </{closed[1]}> closes nothing")
        elif opened := re.fullmatch(r"<([\w-]+)(?: ([^<>]*))?>", words):
            section = Section(opened[1], (opened[2] or "").strip())
            open_sections[-1].children.append(section)
            open_sections.append(section)
        elif told := re.fullmatch(r"(@?\w+)(?:\s+(.*))?", words):
            if told[1] in open_sections[-1].values:
                raise ValueError(f"line {number}: {told[1]} is told twice, and the last one counts")
            open_sections[-1].values[told[1]] = _literal(told[2] or "")
        else:
            raise ValueError(f"line {number}: {words!r} is no section and no value")
    if len(open_sections) > 1:
        raise ValueError(f"<{open_sections[-1].name}> does not end")
    return open_sections[0]


def _literal(text: str) -> str:
    if text.startswith('"'):
        if not re.fullmatch(r'"(?:[^"\\]|\\.)*"', text):
            raise ValueError(f"{text!r}: what follows a quoted value is an error")
        # Ruby inside a quoted value: the name in it, and what holds without it.
        if ruby := re.fullmatch(r"\"#\{ENV\['(\w+)'\](?: \|\| '?([^']*?)'?)?\}\"", text):
            return ruby[2] or f"${ruby[1]}"
        return text[1:-1]
    return re.sub(r"\s+#.*$", "", text)


def size(text: str) -> int:
    """Return the bytes that fluentd reads: the first unit that any digits are followed by, wherever in the text."""
    for unit, factor in _SIZES:
        if found := re.search(rf"([0-9]+){unit}", text, re.I):
            return int(found[1]) * factor
    return int(_number(text))


def seconds(text: str) -> float:
    """Return the seconds that fluentd reads, in the same way; without a unit the number counts, with its fraction."""
    for unit, factor in _TIMES:
        if found := re.search(rf"([0-9]+){unit}", text):
            return int(found[1]) * factor
    return _number(text)


def boolean(text: str) -> bool | None:
    """Return the truth that fluentd reads; None, which counts as false, for what it does not know (`on`)."""
    return {"true": True, "yes": True, "": True, "false": False, "no": False}.get(text)


def _number(text: str) -> float:
    # Ruby's to_f and to_i: the digits at the beginning, 0 where there are none.
    found = re.match(r"\s*[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", text)
    return float(found[0]) if found else 0.0


def meaning(kind: str, text: str) -> Value:
    """Return the value that fluentd takes. Raises `ValueError` where a person would read another one."""
    if kind == "string":
        return text
    if "|" in kind:
        if text not in kind.split("|"):
            raise ValueError(f"{text!r} is none of {kind}")
        return text
    if text.startswith("$"):
        return text
    if kind == "bool":
        value = boolean(text)
        if value is None or not text:
            raise ValueError(f"{text!r} is no truth that fluentd knows: true, yes, false, no")
        return value
    plain = {"integer": r"-?\d+", "float": r"\d+(\.\d+)?", "time": r"\d+[smhd]|\d+(\.\d+)?", "size": r"\d+[kmgtKMGT]?"}
    if not re.fullmatch(plain[kind], text):
        raise ValueError(f"{text!r} is no {kind} that fluentd reads as it is written: it takes {_read(kind, text)}")
    return _read(kind, text)


def _read(kind: str, text: str) -> float:
    return {"time": seconds, "size": size}.get(kind, _number)(text)


def _table(text: str) -> dict[str, str]:
    return {key: kind for kind, *keys in (line.split() for line in text.strip().splitlines()) for key in keys}


_LOG_LEVELS = "trace|debug|info|warn|error|fatal"
_PLUGIN = _table("string @type @id @label @log_level")
_BUFFER = _table("""
string path path_suffix timekey_zone
time flush_interval timekey timekey_wait delayed_commit_timeout retry_timeout retry_wait retry_max_interval
float flush_thread_interval flush_thread_burst_interval retry_secondary_threshold retry_exponential_backoff_base
float chunk_full_threshold
integer flush_thread_count retry_max_times chunk_limit_records queued_chunks_limit_size queue_limit_length
size chunk_limit_size total_limit_size
bool flush_at_shutdown retry_forever retry_randomize timekey_use_utc disable_chunk_backup
text|gzip compress
default|lazy|interval|immediate flush_mode
throw_exception|block|drop_oldest_chunk overflow_action
exponential_backoff|periodic retry_type
""")

KNOWN: dict[tuple[str, str], dict[str, str]] = {
    ("system", ""): _table(f"integer workers\n{_LOG_LEVELS} log_level\nstring root_dir process_name"),
    ("label", ""): {},
    ("source", "forward"): _PLUGIN
    | _table("""
integer port backlog linger_timeout
string bind source_address_key source_hostname_key tag add_tag_prefix
size chunk_size_limit chunk_size_warn_limit
bool skip_invalid_event resolve_hostname deny_keepalive send_keepalive_packet
time blocking_timeout
"""),
    ("source", "tail"): _PLUGIN
    | _table("""
string path tag pos_file path_delimiter path_key path_timezone encoding from_encoding exclude_path
time rotate_wait refresh_interval multiline_flush_interval limit_recently_modified pos_file_compaction_interval
bool read_from_head emit_unmatched_lines enable_watch_timer enable_stat_watcher open_on_every_update
bool skip_refresh_on_startup ignore_repeated_permission_error follow_inodes
integer read_lines_limit
size read_bytes_limit_per_second max_line_size
"""),
    ("parse", "none"): _PLUGIN | _table("string message_key"),
    ("match", "null"): _PLUGIN,
    ("match", "forward"): _PLUGIN
    | _table("""
tcp|tls transport
time send_timeout connect_timeout heartbeat_interval recover_wait hard_timeout ack_response_timeout expire_dns_cache
time keepalive_timeout
transport|tcp|udp|none heartbeat_type
integer phi_threshold read_interval_msec
size read_length
bool phi_failure_detector require_ack_response dns_round_robin ignore_network_errors_at_startup time_as_integer
bool verify_connection_at_startup tls_insecure_mode tls_allow_self_signed_cert tls_verify_hostname keepalive
text|gzip compress
TLSv1_1|TLSv1_2|TLSv1_3 tls_version
string tls_ciphers tls_ca_cert_path tls_cert_path tls_client_cert_path tls_client_private_key_path
string tls_client_private_key_passphrase
"""),
    ("security", ""): _table("string self_hostname shared_key"),
    ("server", ""): _table("string host name shared_key username password\ninteger port weight\nbool standby"),
    ("buffer", "file"): _table("string @type") | _BUFFER,
    ("match", "kafka2"): _PLUGIN
    | _table("""
string brokers topic topic_key default_topic message_key_key default_message_key partition_key_key
string default_partition_key partition_key client_id compression_codec headers headers_from_record
bool exclude_partition_key exclude_partition exclude_message_key exclude_topic_key use_event_time idempotent
bool use_default_for_unknown_topic get_kafka_client_log sasl_over_ssl time_as_integer
integer default_partition connect_timeout socket_timeout max_send_retries required_acks
time ack_timeout
size max_send_limit_bytes
"""),
    ("format", "json"): _table("string @type\nbool add_newline\noj|yajl|json json_parser"),
    ("inject", ""): _table(
        "string tag_key time_key time_format timezone hostname_key worker_id_key\nfloat|unixtime|string time_type\n"
        "bool utc localtime"
    ),
}


def read(section: Section) -> dict[str, Value]:
    """Return a section's values as fluentd takes them. Raises `ValueError` on a key that its plugin does not have."""
    known = KNOWN.get((section.name, section.values.get("@type", "")))
    if known is None:
        raise ValueError(f"<{section.name}> {section.values.get('@type')!r}: port its parameters first")
    if unknown := set(section.values) - set(known):
        raise ValueError(f"<{section.name}>: fluentd knows no {sorted(unknown)}")
    return {key: meaning(known[key], text) for key, text in section.values.items()}


def read_all(root: Section) -> None:
    """Read every section. Raises `ValueError` on a key or value that fluentd would not take as it is written."""
    for section in root.children:
        read(section)
        read_all(section)
