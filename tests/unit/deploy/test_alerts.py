"""Goal: every alert fires on what it is for, with numbers, and on nothing else.

Method: Prometheus' own promtool evaluates the rules over written series; without it the rules' names are checked alone.
"""

from __future__ import annotations

import re
from typing import get_args

from headrace.contract.metrics import Name

CASES = """
  - name: a jump of the label rate
    interval: 1m
    input_series:
      - {series: "headrace_train_label_rate_jumps_total{instance='a',task='click',reason='click'}", values: "0x30 1x60"}
      - {series: "headrace_train_label_rate{instance='a',task='click',reason='click'}", values: "0.45x30 0.3x60"}
      - {series: "headrace_train_label_rate_usual{instance='a',task='click',reason='click'}", values: "0.45x90"}
      - {series: "headrace_train_label_rate_jumps_total{instance='a',task='like',reason='like'}", values: "0x90"}
    alert_rule_test:
      - {eval_time: 25m, alertname: HeadraceLabelRateJumped, exp_alerts: []}
      - eval_time: 35m
        alertname: HeadraceLabelRateJumped
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, task: click, reason: click}
            exp_annotations:
              summary: "The label rate of click jumped; it is 30% now"
              description: "The usual rate, with which the newest windows are compared, is 45%. The trainer's log has
                the line of the jump: from, to, samples, standard deviations. Look for a deploy that changed what is
                shown or what is logged."
      - {eval_time: 60m, alertname: HeadraceLabelRateJumped, exp_alerts: []}
  - name: scores drift from what comes, and few samples say nothing
    interval: 1m
    input_series:
      - {series: "headrace_train_recent_calibration{instance='a',task='click'}", values: "1.04x10 1.58x20"}
      - {series: "headrace_train_recent_samples{instance='a',task='click'}", values: "5000x30"}
      - {series: "headrace_train_recent_calibration{instance='a',task='like'}", values: "3x30"}
      - {series: "headrace_train_recent_samples{instance='a',task='like'}", values: "90x30"}
    alert_rule_test:
      - {eval_time: 10m, alertname: HeadraceCalibrationDrifts, exp_alerts: []}
      - eval_time: 20m
        alertname: HeadraceCalibrationDrifts
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, task: click}
            exp_annotations:
              summary: "The scores of click drift: of the newest impressions they say 1.58 times what came"
              description: "Rankings may still be right, prices and thresholds are not. Look for a watermark that stands
                still (positives come, negatives wait), a change of the label rate, or a recipe that learns
                numbers as they are (standardize) or a long window's positives before the negatives of their
                time (ordered_from_ms): headrace check names what a recipe lacks. A task of which samples
                wait (headrace_train_samples_held) knows no negative before its first window has passed."
  - name: no events come, nobody is behind
    interval: 1m
    input_series:
      - {series: "headrace_train_lag_seconds{instance='a'}", values: "0+60x60"}
      - {series: "headrace_train_lag_records{instance='a'}", values: "0x60"}
    alert_rule_test:
      - {eval_time: 50m, alertname: HeadraceTrainBehind, exp_alerts: []}
      - {eval_time: 50m, alertname: HeadraceTrainOverloaded, exp_alerts: []}
  - name: more samples than are learnt
    interval: 1m
    input_series:
      - {series: "headrace_train_lag_seconds{instance='a'}", values: "0+30x60"}
      - {series: "headrace_train_lag_records{instance='a'}", values: "0+120x60"}
      - {series: "headrace_train_samples_per_second{instance='a'}", values: "9000x60"}
    alert_rule_test:
      - eval_time: 15m
        alertname: HeadraceTrainBehind
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "The trainer is 7m 30s behind"
              description: "1800 records wait. It learns 9k samples/s. Nothing is lost while the topic keeps them. Give
                it a core, or lower negative_share in the recipe."
      - {eval_time: 15m, alertname: HeadraceTrainOverloaded, exp_alerts: []}
      - eval_time: 40m
        alertname: HeadraceTrainOverloaded
        exp_alerts:
          - exp_labels: {severity: critical, instance: a}
            exp_annotations: {summary: "The trainer falls behind by 2 records/s and will not catch up by itself"}
  - name: a model that is worse than the base rate on one slice, and promises too much on another
    interval: 1m
    input_series:
      - {series: "headrace_train_window_normalized_entropy{task='click',slice='tab=0'}", values: "1.5x60"}
      - {series: "headrace_train_window_calibration{task='click',slice='tab=0'}", values: "1x60"}
      - {series: "headrace_train_window_samples{task='click',slice='tab=0'}", values: "1000x60"}
      - {series: "headrace_train_window_normalized_entropy{task='click',slice='tab=1'}", values: "0.9x60"}
      - {series: "headrace_train_window_calibration{task='click',slice='tab=1'}", values: "1.5x60"}
      - {series: "headrace_train_window_samples{task='click',slice='tab=1'}", values: "1000x60"}
      - {series: "headrace_train_window_calibration{task='click',slice='tab=2'}", values: "9x60"}
      - {series: "headrace_train_window_samples{task='click',slice='tab=2'}", values: "20x60"}
      - {series: "headrace_train_samples_refused_total{instance='a'}", values: "0x60"}
    alert_rule_test:
      - eval_time: 30m
        alertname: HeadraceModelNoBetterThanConstant
        exp_alerts:
          - exp_labels: {severity: warning, task: click, slice: "tab=0"}
            exp_annotations: {summary: "The model's log loss on click tab=0 is 1.5 times that of the base rate alone"}
      - eval_time: 30m
        alertname: HeadraceModelMiscalibrated
        exp_alerts:
          - exp_labels: {severity: warning, task: click, slice: "tab=1"}
            exp_annotations: {summary: "The model predicts 1.5 times the positives that click tab=1 has"}
      - {eval_time: 30m, alertname: HeadraceSamplesRefused, exp_alerts: []}
  - name: an upload that hangs, after some that took their time
    interval: 1m
    input_series:
      - {series: "headrace_train_upload_age_seconds{instance='a',what='checkpoint'}",
         values: "0+60x8 0+60x8 0x3 0+60x20"}
    alert_rule_test:
      - {eval_time: 17m, alertname: HeadraceUploadHangs, exp_alerts: []}
      - eval_time: 36m
        alertname: HeadraceUploadHangs
        exp_alerts:
          - exp_labels: {severity: critical, instance: a, what: checkpoint}
            exp_annotations:
              summary: "The trainer a has been uploading a checkpoint for 14m 0s"
              description: "Training and deltas go on, and a restart would redo what came since the newest checkpoint.
                See whether the store answers and how fast it is: `headrace status`, the NameNode's page."
  - name: a tag that is held back, and one that was
    interval: 1m
    input_series:
      - {series: "headrace_ingest_dead_letter_ceiling_shut{instance='a',tag='shop.click'}", values: "0x5 1x20 0x10"}
      - {series: "headrace_ingest_dead_letter_ceiling_shut{instance='a',tag='shop.dwell'}", values: "0x60"}
    alert_rule_test:
      - {eval_time: 3m, alertname: HeadraceTagHeldBack, exp_alerts: []}
      - eval_time: 10m
        alertname: HeadraceTagHeldBack
        exp_alerts:
          - exp_labels: {severity: critical, instance: a, tag: shop.click}
            exp_annotations:
              summary: "a holds the tag shop.click back: too many of its events were refused"
              description: "Shippers keep what comes. `headrace dead-letters list` shows the reasons. Correct the
                service or its declaration, and restart the gateways."
      - {eval_time: 30m, alertname: HeadraceTagHeldBack, exp_alerts: []}
  - name: a sink that missed records, and stages that did not
    interval: 1m
    input_series:
      - {series: "headrace_sink_gap_total{instance='a',topic=''}", values: "0x5 2x20"}
      - {series: "headrace_train_gap_total{instance='b',topic=''}", values: "0x60"}
      - {series: "headrace_ingest_gap_total{instance='c',topic='logs'}", values: "0x5 7x20"}
    alert_rule_test:
      - {eval_time: 3m, alertname: HeadraceGap, exp_alerts: []}
      - eval_time: 10m
        alertname: HeadraceGap
        exp_alerts:
          - exp_labels: {severity: critical, instance: a}
            exp_annotations:
              summary: "a found 2 gaps in what it read"
              description: "Its log names the offsets. `headrace ledger` says whether an event is lost."
          - exp_labels: {severity: critical, instance: c, topic: logs}
            exp_annotations:
              summary: "c found 7 gaps in what it read from logs"
              description: "Its log names the offsets. `headrace ledger` says whether an event is lost."
  - name: upkeep that fails while files grow, and a failure that the next upkeep made good
    interval: 1m
    input_series:
      - {series: "headrace_sink_lake_upkeep_failed_total{instance='a'}", values: "0x70 1x60"}
      - {series: "headrace_sink_lake_files{instance='a'}", values: "100+1x130"}
      - {series: "headrace_sink_lake_upkeep_failed_total{instance='b'}", values: "0x70 1x60"}
      - {series: "headrace_sink_lake_files{instance='b'}", values: "100x130"}
    alert_rule_test:
      - {eval_time: 60m, alertname: HeadraceLakeUpkeepFails, exp_alerts: []}
      - eval_time: 90m
        alertname: HeadraceLakeUpkeepFails
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "Upkeep of the lake failed within the last hour, and its files grow in number"
              description: "The sink's log has the reason. `headrace lake` compacts and vacuums by hand."
  - name: a worker that was started with an edited file, one that catches up, one in line
    interval: 1m
    input_series:
      - {series: "headrace_stream_rules_differ{instance='a'}", values: "1x30"}
      - {series: "headrace_stream_rules_number{instance='a'}", values: "3x30"}
      - {series: "headrace_stream_rules_differ{instance='b'}", values: "1x3 0x27"}
      - {series: "headrace_stream_rules_differ{instance='c'}", values: "0x30"}
    alert_rule_test:
      - {eval_time: 3m, alertname: HeadraceRulesDiffer, exp_alerts: []}
      - eval_time: 20m
        alertname: HeadraceRulesDiffer
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "The project file of a is not what events are read by"
              description: "Change 3 is in force. `headrace spec` shows what the file would change, `headrace spec
                apply` puts it in force; or deploy the file that was applied."
  - name: a certificate near its end
    interval: 1m
    input_series:
      - {series: "headrace_ingest_tls_days_left{instance='a'}", values: "7.02x30 6.94x60"}
      - {series: "headrace_ingest_tls_days_left{instance='b'}", values: "90x90"}
    alert_rule_test:
      - {eval_time: 35m, alertname: HeadraceCertificateEnds, exp_alerts: []}
      - eval_time: 60m
        alertname: HeadraceCertificateEnds
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "The certificate of gateway a ends in 6.9 days"
              description: "From then on every shipper refuses it, all at once. Renew the file of ingest.tls_cert; the
                gateway serves the new one within 30 s, without a restart."
  - name: late events
    interval: 1m
    input_series:
      - {series: "headrace_ingest_late_oldest_seconds{instance='a'}", values: "0+60x120"}
      - {series: "headrace_ingest_late_oldest_seconds{instance='b'}", values: "0x120"}
      - {series: "headrace_ingest_late_unknown{instance='a'}", values: "0x30 2x90"}
      - {series: "headrace_ingest_late_unknown{instance='b'}", values: "0x30 2x90"}
      - {series: "headrace_stream_events_too_late_total{instance='s'}", values: "0x30 3x90"}
    alert_rule_test:
      - {eval_time: 60m, alertname: HeadraceLateEventsWait, exp_alerts: []}
      - eval_time: 70m
        alertname: HeadraceLateEventsWait
        exp_alerts:
          - exp_labels: {severity: warning}
            exp_annotations:
              summary: "Late events have waited for 1h 10m 0s to be looked up"
              description: "They are dead letters (too_late) meanwhile, and not lost. The gateways' logs say what is
                away: Kafka, the store, or a lake that is behind."
      - {eval_time: 20m, alertname: HeadraceLateEventsUnknown, exp_alerts: []}
      - eval_time: 40m
        alertname: HeadraceLateEventsUnknown
        exp_alerts:
          - exp_labels: {severity: warning}
            exp_annotations:
              summary: "2 late events wait for a decision"
              description: "Log and lake no longer tell whether they were taken. `headrace dead-letters list --reason
                too_late` shows them; `headrace dead-letters retry --reason too_late --take`, or --drop, decides."
      - {eval_time: 20m, alertname: HeadraceLateEventsDropped, exp_alerts: []}
      - eval_time: 40m
        alertname: HeadraceLateEventsDropped
        exp_alerts:
          - exp_labels: {severity: warning, instance: s}
            exp_annotations:
              summary: "s dropped events that are older than its memory and that nobody had looked up"
              description: "Gateways set such events aside. Look for another writer to the topic of events, or for a
                gateway whose clock is far behind; the events lie in the topic."
      - {eval_time: 110m, alertname: HeadraceLateEventsDropped, exp_alerts: []}
  - name: foreign records, the first of a series that begins with it
    interval: 1m
    input_series:
      - series: "headrace_train_records_unreadable_total{instance='t',topic='samples',kind='foreign'}"
        values: "_x29 1x60"
      - series: "headrace_serve_records_unreadable_total{instance='s',topic='features',kind='foreign'}"
        values: "3x90"
    alert_rule_test:
      - {eval_time: 25m, alertname: HeadraceRecordsUnreadable, exp_alerts: []}
      - eval_time: 35m
        alertname: HeadraceRecordsUnreadable
        exp_alerts:
          - exp_labels: {severity: critical, instance: t, topic: samples, kind: foreign}
            exp_annotations:
              summary: "Records that are foreign in the topic samples: 1 in 15 minutes, skipped"
              description: "Someone besides Headrace writes into its topics, or a writer is broken. The stage's log
                names partition and offset. A foreign record costs nothing; behind a damaged one the stage stops where
                samples were in it."
      - {eval_time: 50m, alertname: HeadraceRecordsUnreadable, exp_alerts: []}
"""


def test_rules_name_metrics_that_exist(rules):
    named = set(re.findall(r"headrace_[a-z]+_(\w+)", "".join(file.read_text() for file in rules)))
    assert named and named <= set(get_args(Name)), "every metric of a rule is in contract/metrics/"


def test_alerts_fire_on_what_they_are_for(promtool):
    done = promtool(CASES)
    assert done.returncode == 0, done.stdout + done.stderr
