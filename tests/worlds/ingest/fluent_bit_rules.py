"""fluent-bit's classic configuration by fluent-bit's own rules: how it reads the text, and what each value means.

Ported from what fluent-bit 5.1 does, not from its words: `src/flb_utils.c` (sizes are decimal, times are whole
seconds), `src/flb_config.c` (the service's keys), `flb_input.c`, `flb_output.c`, `flb_upstream.c` and the config maps
of the plugins that our files name. Nothing is refused at the start but unknown keys: `0.1` as a time is 0 seconds. So
`meaning` refuses what a person reads in another way than fluent-bit does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TIMES = {"d": 86_400, "h": 3_600, "m": 60}
_SIZES = {"K": 10**3, "M": 10**6, "G": 10**9}
CHUNK_BYTES = 2_048_000
"""A chunk takes no further event above this size; the last one may still be large."""

Value = str | int | float | bool


@dataclass
class Section:
    """`[NAME]` and its entries, keys in lower case."""

    name: str
    values: dict[str, str] = field(default_factory=dict)

    @property
    def plugin(self) -> str:
        """Return the plugin's name."""
        return self.values.get("name", "")


def parse(text: str) -> list[Section]:
    """Return what fluent-bit reads of a file. Raises `ValueError` on what it would refuse."""
    sections: list[Section] = []
    indent = ""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        if opened := re.fullmatch(r"\[(\w+)\]", line.rstrip()):
            sections.append(Section(opened[1].upper()))
            indent = ""
            continue
        told = re.fullmatch(r"([ \t]+)(\S+)[ \t]+(\S.*)", line.rstrip())
        if told is None or not sections:
            raise ValueError(f"line {number}: {words!r} has no section, no indentation or no value")
        if told[1] != (indent or told[1]):
            raise ValueError(f"line {number}: the indentation changes within a section")
        indent = told[1]
        key = told[2].lower()
        if key in sections[-1].values:
            raise ValueError(f"line {number}: {key} is told twice")
        sections[-1].values[key] = told[3]
    return sections


def size(text: str) -> int:
    """Return the bytes that fluent-bit reads, -1 for what it does not know. K, M and G are decimal."""
    if text.lower() == "false":
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KkMmGg]?)[Bb]?", text)
    return -1 if found is None else int(float(found[1]) * _SIZES.get(found[2].upper(), 1))


def seconds(text: str) -> int:
    """Return the seconds that fluent-bit reads: the whole number at the beginning, times the last letter."""
    found = re.match(r"\s*[+-]?\d+", text)
    return (int(found[0]) if found else 0) * _TIMES.get(text[-1:].lower(), 1)


def boolean(text: str) -> bool | None:
    """Return the truth that fluent-bit reads, None for what it does not know (`1`)."""
    return {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}.get(text.lower())


def meaning(kind: str, text: str) -> Value:
    """Return the value that fluent-bit takes. Raises `ValueError` where a person would read another one."""
    if kind == "str" or text.startswith("${"):
        return text
    if "|" in kind:
        if text not in kind.split("|"):
            raise ValueError(f"{text!r} is none of {kind}")
        return text
    if kind == "bool":
        value = boolean(text)
        if value is None:
            raise ValueError(f"{text!r} is no truth that fluent-bit knows: on, off, true, false, yes, no")
        return value
    if kind == "retries":
        return -1 if text.lower() in ("no_limits", "false", "off") else int(text)
    if kind == "size":
        if (bytes_ := size(text)) < 0:
            raise ValueError(f"{text!r} is no size that fluent-bit knows: 16M, 16MB, 16000000")
        return bytes_
    # A pause in seconds that tail itself splits at the dot.
    plain = {"int": r"-?\d+", "double": r"\d+(\.\d+)?", "pause": r"\d+(\.\d+)?", "time": r"\d+[sSmMhHdD]?"}
    if not re.fullmatch(plain[kind], text):
        raise ValueError(f"{text!r} is no {kind} that fluent-bit reads as it is written: it takes {seconds(text)}")
    return seconds(text) if kind == "time" else float(text) if kind in ("double", "pause") else int(text)


def _table(text: str) -> dict[str, str]:
    return {key: kind for kind, *keys in (line.split() for line in text.strip().splitlines()) for key in keys}


_INPUT = _table("""
str name tag alias
filesystem|memory|memrb storage.type
bool storage.pause_on_chunks_overlimit threaded
size mem_buf_limit
off|trace|debug|info|warn|error log_level
""")
_OUTPUT = _table("""
str name match match_regex alias host
int port workers
retries retry_limit
size storage.total_limit_size
off|trace|debug|info|warn|error log_level
bool tls tls.verify tls.verify_hostname
int tls.debug
str tls.ca_file tls.ca_path tls.crt_file tls.key_file tls.key_passwd tls.vhost tls.min_version tls.max_version
bool net.keepalive net.tcp_keepalive net.connect_timeout_log_error net.proxy_env_ignore
time net.connect_timeout net.io_timeout net.keepalive_idle_timeout net.tcp_keepalive_time net.tcp_keepalive_interval
int net.keepalive_max_recycle net.max_worker_connections net.tcp_keepalive_probes
str net.source_address net.dns.mode net.dns.resolver
""")

KNOWN: dict[tuple[str, str], dict[str, str]] = {
    ("SERVICE", ""): _table("""
double flush
int grace http_port scheduler.base scheduler.cap storage.max_chunks_up coro_stack_size
bool daemon http_server storage.checksum storage.metrics storage.delete_irrecoverable_chunks storage.trim_files
bool hot_reload storage.backlog.flush_on_shutdown
str http_listen parsers_file plugins_file streams_file log_file storage.path
off|trace|debug|info|warn|error log_level
normal|full storage.sync
size storage.backlog.mem_limit
"""),
    ("INPUT", "forward"): _INPUT
    | _table("""
str listen tag_prefix unix_path unix_perm shared_key self_hostname security.users
int port
size buffer_chunk_size buffer_max_size
bool empty_shared_key
"""),
    ("INPUT", "tail"): _INPUT
    | _table("""
str path exclude_path key path_key offset_key parser tag_regex db multiline.parser db.journal_mode
extra|full|normal|off db.sync
bool read_from_head skip_long_lines skip_empty_lines truncate_long_lines db.locking db.compare_filename
bool inotify_watcher file_cache_advise exit_on_eof ignore_active_older_files docker_mode multiline
pause refresh_interval
time rotate_wait ignore_older watcher_interval progress_check_interval
size buffer_chunk_size buffer_max_size static_batch_size event_batch_size
"""),
    ("OUTPUT", "forward"): _OUTPUT
    | _table("""
bool time_as_integer require_ack_response send_options empty_shared_key retain_metadata_in_forward_mode
bool fluentd_compat add_option
str shared_key self_hostname username password tag unix_path upstream
text|gzip compress
"""),
    ("OUTPUT", "kafka"): _OUTPUT
    | _table("""
str brokers topics topic_key message_key message_key_field timestamp_key client_id group_id
json|msgpack|gelf|avro|raw|otlp_json|otlp_proto format
double|iso8601|iso8601_ns timestamp_format
bool dynamic_topic
int queue_full_retries
"""),
}
_LIBRDKAFKA = _table("""
int request.required.acks message.timeout.ms queue.buffering.max.messages message.max.bytes linger.ms retries
double queue.buffering.max.ms
bool enable.idempotence
none|gzip|snappy|lz4|zstd compression.codec
str security.protocol sasl.mechanism sasl.username sasl.password ssl.ca.location client.id
""")


def read(section: Section) -> dict[str, Value]:
    """Return a section's values as fluent-bit takes them. Raises `ValueError` on a key that its plugin lacks."""
    known = KNOWN.get((section.name, section.plugin))
    if known is None:
        raise ValueError(f"[{section.name}] {section.plugin!r}: port its config map first")
    if section.plugin == "kafka":
        known = known | {f"rdkafka.{key}": kind for key, kind in _LIBRDKAFKA.items()}
    if unknown := set(section.values) - set(known):
        raise ValueError(f"[{section.name}]: fluent-bit knows no {sorted(unknown)}")
    return {key: meaning(known[key], text) for key, text in section.values.items()}
