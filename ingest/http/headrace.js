/* Headrace in the browser: events to the collector, none lost on reload, none counted twice.
 *
 *   <script src="https://collect.example.com/v1/headrace.js" data-token="TOKEN" defer></script>
 *   headrace.track("store.click", { request_id: "r1", user_id: 7, item_id: 42 });
 *
 * Before the script has loaded: window.headrace = window.headrace || []; headrace.push(["store.click", {...}]);
 *
 * 1. track: the event gets its id and time, and lies in localStorage before track returns.
 * 2. send: after `flushMs`, or when a batch is full, in order, one request at a time; a beacon when the page hides.
 * 3. settle: a 2xx takes the events out of localStorage. Anything else, a beacon too, leaves them there, and they are
 *    sent again with the same ids, by this page or the next one of this origin: the gateway drops repeats by id.
 *
 * Each request says this clock's time (sent_at), by which the collector corrects the events' times where it is wrong.
 *
 * Several tabs share the store: each sends its own events, and after ADOPT_MS those that another tab left behind.
 *
 * A page that clears its storage (a log-out) takes nothing away: what waits is in memory too, and is stored again. The
 * key GENERATION tells that from another tab, which sent an event and removed it: only clearing changes it.
 */
(function () {
  "use strict";

  var script = document.currentScript;
  var given = window.headrace;
  if (given && typeof given.track === "function") return;

  var options = (script && script.dataset) || {};
  var endpoint = options.endpoint || new URL("events", (script && script.src) || location.href).href;
  var url = endpoint + (options.token ? "?token=" + encodeURIComponent(options.token) + "&" : "?") + "sent_at=";
  var FLUSH_MS = number(options.flushMs, 1000);
  var BACKOFF_MS = number(options.backoffMs, 1000);
  var QUEUE_MAX = number(options.queueMax, 2000); /* events that wait, over all tabs of this origin */
  var BACKOFF_MAX_MS = 60000;
  var TIMEOUT_MS = 30000;
  var ADOPT_MS = number(options.adoptMs, 15000);
  var BATCH_MAX = 100;
  var BATCH_CHARS = 16000; /* at most 48 kB in UTF-8: a browser lets 64 kB of beacons be under way */
  var PREFIX = "headrace:" + endpoint + ":";
  var GENERATION = "headrace:generation";

  var store = openStore();
  var generation = null; /* the store's, when this page saw it last */
  var tab = tabId();
  var waiting = []; /* {key, text, stored}: oldest first */
  var known = Object.create(null); /* keys in `waiting` */
  var counter = 0;
  var sending = null; /* the AbortController of the request under way */
  var timer = 0;
  var failures = 0;
  var notBefore = 0;
  var batchMax = BATCH_MAX;
  var stats = { tracked: 0, sent: 0, appended: 0, deadLettered: 0, repeated: 0, dropped: 0, refused: 0, retries: 0, restored: 0, unstored: 0 };

  function number(text, otherwise) {
    var value = Number(text);
    return text !== undefined && isFinite(value) && value >= 0 ? value : otherwise;
  }

  function openStore() {
    try {
      var local = window.localStorage;
      local.getItem(GENERATION); /* one that is full can be read still: what lies in it is taken up */
      return local;
    } catch (error) {
      return null; /* blocked: events live as long as the page */
    }
  }

  /* The same over reloads of a tab, so that a reload takes up its own events at once. */
  function tabId() {
    try {
      var id = window.sessionStorage.getItem("headrace:tab");
      if (!id) window.sessionStorage.setItem("headrace:tab", (id = uuid()));
      return id;
    } catch (error) {
      return uuid();
    }
  }

  function uuid() {
    var source = window.crypto;
    if (source && source.randomUUID) return source.randomUUID();
    /* A page without TLS has no randomUUID. */
    var bytes = new Uint8Array(16);
    if (source && source.getRandomValues) source.getRandomValues(bytes);
    else for (var i = 0; i < 16; i++) bytes[i] = Math.random() * 256;
    bytes[6] = (bytes[6] & 15) | 64;
    bytes[8] = (bytes[8] & 63) | 128;
    var hex = Array.prototype.map.call(bytes, function (byte) { return (byte + 256).toString(16).slice(1); }).join("");
    return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
  }

  /* Returns the event's id, or null where the queue is full: the newest event is the one that is refused. */
  function track(tag, fields) {
    if (typeof tag !== "string" || !tag) throw new TypeError("headrace.track: the tag is the event type's tag, a text");
    var event = Object.assign({}, fields, { tag: tag });
    if (event.event_id === undefined) event.event_id = uuid();
    if (event.event_time_ms === undefined && event.time === undefined) event.event_time_ms = Date.now();
    stats.tracked++;
    /* The time and a counter first: keys sort in the order of the events. */
    var key = PREFIX + digits(Date.now(), 13) + ":" + digits(counter++, 6) + ":" + tab + ":" + uuid().slice(0, 8);
    var item = { key: key, text: textOf(event), stored: false };
    if (item.text === null || waiting.length >= QUEUE_MAX) {
      stats.dropped++;
      return null;
    }
    keep(item);
    add(item);
    if (waiting.length >= batchMax) schedule(0);
    else schedule(FLUSH_MS);
    return event.event_id;
  }

  /* Returns the event's JSON, or null where it has none: a fault in a field is no reason to end the page's own code. */
  function textOf(event) {
    try {
      return JSON.stringify(event, function (_name, value) {
        if (typeof value !== "bigint") return value;
        return Number.isSafeInteger(Number(value)) ? Number(value) : String(value);
      });
    } catch (error) {
      console.error("headrace: an event that is no JSON is dropped: " + error.message);
      return null;
    }
  }

  function digits(value, count) {
    return ("0000000000000" + value).slice(-count);
  }

  function keep(item) {
    item.stored = false;
    try {
      if (store) {
        store.setItem(item.key, item.text);
        item.stored = true;
      }
    } catch (error) {
      /* The origin's quota is used up, or storage was blocked: it is sent from memory. */
    }
    if (!item.stored) stats.unstored++;
  }

  /* Returns null where the store says that there is none, undefined where it says nothing. */
  function read(key) {
    try {
      return store.getItem(key);
    } catch (error) {
      return undefined;
    }
  }

  /* Stores again what waits, where the page or another tab has cleared the store since the last look. */
  function restore() {
    if (!store) return;
    var found = read(GENERATION);
    if (found === undefined || (found !== null && found === generation)) return;
    try {
      if (found === null) store.setItem(GENERATION, (found = uuid()));
    } catch (error) {
      found = null; /* no room: looked at again the next time, and until then nothing that is gone counts as sent */
    }
    generation = found;
    waiting.forEach(function (item) {
      if (!item.stored || read(item.key) !== null) return;
      keep(item);
      stats.restored++;
    });
  }

  function add(item) {
    waiting.push(item);
    known[item.key] = true;
  }

  function forget(items) {
    items.forEach(function (item) {
      delete known[item.key];
      if (item.stored) {
        try { store.removeItem(item.key); } catch (error) { /* it is sent once more, and is a repeat then */ }
      }
    });
    waiting = waiting.filter(function (item) { return known[item.key]; });
  }

  /* Takes up what earlier pages of this tab left behind, and what other tabs left longer than ADOPT_MS ago. */
  function adopt() {
    if (!store) return;
    restore();
    var keys = [];
    for (var i = 0; i < size(); i++) {
      var key = store.key(i);
      if (!key || key.slice(0, PREFIX.length) !== PREFIX || known[key]) continue;
      var parts = key.slice(PREFIX.length).split(":");
      if (parts[2] === tab || Date.now() - Number(parts[0]) > ADOPT_MS) keys.push(key);
    }
    keys.sort().forEach(function (key) {
      var text = read(key);
      if (text) add({ key: key, text: text, stored: true });
    });
    if (keys.length) waiting.sort(function (a, b) { return a.key < b.key ? -1 : 1; });
  }

  function size() {
    try {
      return store.length;
    } catch (error) {
      return 0;
    }
  }

  /* The oldest events that fit one request; those that another tab has sent meanwhile are gone from the store. */
  function batch(from) {
    restore();
    var items = [], chars = 0, gone = [];
    for (var i = from || 0; i < waiting.length && items.length < batchMax; i++) {
      var item = waiting[i];
      if (item.stored && generation !== null && read(item.key) === null) {
        gone.push(item);
        continue;
      }
      if (items.length && chars + item.text.length > BATCH_CHARS) break;
      chars += item.text.length + 1;
      items.push(item);
    }
    if (gone.length) forget(gone);
    return items;
  }

  function body(items) {
    return "[" + items.map(function (item) { return item.text; }).join(",") + "]";
  }

  function schedule(delay) {
    if (sending || !waiting.length) return;
    var wait = Math.max(delay, notBefore - Date.now());
    if (timer && delay > 0) return;
    clearTimeout(timer);
    timer = setTimeout(send, Math.max(0, wait));
  }

  function send() {
    timer = 0;
    if (sending) return; /* navigator.onLine is not asked: where it is wrong, no online event would ever come */
    var items = batch();
    if (!items.length) return;
    var text = body(items);
    var abort = (sending = new AbortController());
    var limit = setTimeout(function () { abort.abort(); }, TIMEOUT_MS);
    /* text/plain and the token in the URL: a simple request, which costs no preflight. */
    fetch(url + Date.now(), {
      method: "POST",
      body: text,
      headers: { "Content-Type": "text/plain" },
      credentials: "omit",
      keepalive: text.length <= BATCH_CHARS + 2, /* a longer one would pass the browser's bound and never go */
      signal: abort.signal,
    }).then(function (response) {
      return response.ok
        ? response.json().then(function (told) { settled(items, told); })
        : failed(items, response.status, response.headers.get("Retry-After"));
    }).catch(function () {
      failed(items, 0, null);
    }).then(function () {
      clearTimeout(limit);
      sending = null;
      schedule(waiting.length >= batchMax || failures ? 0 : FLUSH_MS);
    });
  }

  function settled(items, told) {
    forget(items);
    failures = 0;
    notBefore = 0;
    batchMax = Math.min(BATCH_MAX, batchMax * 2);
    stats.sent += items.length;
    stats.appended += told.appended || 0;
    stats.deadLettered += told.dead_lettered || 0;
    stats.repeated += told.repeated || 0;
  }

  function failed(items, status, retryAfter) {
    if (status === 400 || status === 413) {
      /* One event spoils its batch: halve until it stands alone, then leave it out and say so. */
      if (items.length > 1) {
        batchMax = Math.ceil(items.length / 2);
        return;
      }
      forget(items);
      stats.refused++;
      console.error("headrace: the collector refuses an event (" + status + ")");
      return;
    }
    stats.retries++;
    failures++;
    if (status === 401 || status === 403) console.error("headrace: the collector refuses this page (" + status + ")");
    /* Full jitter, so that browsers do not come back together after an outage. */
    var backoff = Math.random() * Math.min(BACKOFF_MAX_MS, BACKOFF_MS * Math.pow(2, failures));
    var asked = Number(retryAfter) > 0 ? Number(retryAfter) * 1000 * (1 + Math.random()) : 0;
    notBefore = Date.now() + Math.max(backoff, Math.min(asked, BACKOFF_MAX_MS));
  }

  /* The page may never come back: hand over what waits. Nobody tells whether it arrived, so it stays in the store. */
  function hide() {
    if (!navigator.sendBeacon) return;
    for (var at = 0; at < waiting.length; ) {
      var items = batch(at);
      if (!items.length || !navigator.sendBeacon(url + Date.now(), new Blob([body(items)], { type: "text/plain" }))) return;
      at += items.length;
    }
  }

  function online() {
    failures = 0;
    notBefore = 0;
    adopt();
    schedule(0);
  }

  var api = {
    track: track,
    push: function (call) { return track(call[0], call[1]); },
    flush: function () { schedule(0); },
    stats: function () { return Object.assign({ waiting: waiting.length }, stats); },
  };

  window.addEventListener("pagehide", hide);
  document.addEventListener("visibilitychange", function () {
    if (document.visibilityState === "hidden") hide();
    else schedule(FLUSH_MS);
  });
  window.addEventListener("online", online);
  window.addEventListener("storage", function (event) { if (event.key === null) restore(); }); /* another tab cleared */
  window.addEventListener("pageshow", function (event) { if (event.persisted) online(); });
  setInterval(function () { adopt(); schedule(FLUSH_MS); }, ADOPT_MS);

  adopt();
  schedule(0);
  window.headrace = api;
  if (Array.isArray(given)) given.forEach(api.push);
})();
