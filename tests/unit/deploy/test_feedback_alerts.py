"""Goal: a ledger that closes while every label is negative is told by an alert.

Method: Prometheus' own promtool evaluates the rules over series as the failures make them: a shipper that holds clicks
back, a service that stops logging them.
"""

from __future__ import annotations

CASES = """
  - name: a shipper that holds clicks back for longer than the window, from the start
    interval: 1m
    input_series:
      - {series: "headrace_stream_negatives_total{instance='a',task='click'}", values: "0+6000x60"}
      - {series: "headrace_stream_positives_total{instance='a',task='click'}", values: "0x60"}
      - {series: "headrace_stream_feedback_late_total{instance='a',task='click'}", values: "0+300x60"}
      - {series: "headrace_ingest_feedback_delay_seconds{instance='g',type='click'}", values: "3000x60"}
      - {series: "headrace_ingest_feedback_delay_seconds{instance='g',type='like'}", values: "0.2x60"}
    alert_rule_test:
      - eval_time: 30m
        alertname: HeadraceFeedbackGone
        exp_alerts:
          - exp_labels: {severity: critical}
            exp_annotations:
              summary: "Every sample is a negative, 90k in 15 minutes"
              description: "No feedback meets its impression. Look at headrace_ingest_feedback_delay_seconds,
                headrace_stream_feedback_late_total and headrace_stream_feedback_orphan_total. Feedback that a shipper
                holds back, or whose key its service logs in another form, does this."
      - eval_time: 30m
        alertname: HeadraceFeedbackLate
        exp_alerts:
          - exp_labels: {severity: warning, task: click}
            exp_annotations:
              summary: "4.5k feedbacks of click came after their window in 15 minutes, more than 5% of all"
              description: "Their impressions are negatives already. If headrace_ingest_feedback_delay_seconds is high,
                a shipper holds them back; if not, the window is too short for what people do."
      - eval_time: 30m
        alertname: HeadraceFeedbackDelayed
        exp_alerts:
          - exp_labels: {severity: warning, instance: g, type: click}
            exp_annotations:
              summary: "Half of the click reaches g more than 50m 0s after it happened"
              description: "Look at the flush interval of its shippers (fluentd reads 100ms as 6,000 s), at their
                backlog, and at the clocks of their hosts. Delays beyond the task's window become negatives."
  - name: a service that stops logging clicks at 8 h, while likes go on
    interval: 1m
    input_series:
      - {series: "headrace_stream_negatives_total{instance='a',task='click'}", values: "0+600x600"}
      - {series: "headrace_stream_positives_total{instance='a',task='click'}", values: "0+60x480 28800x120"}
      - {series: "headrace_stream_negatives_total{instance='a',task='like'}", values: "0+600x600"}
      - {series: "headrace_stream_positives_total{instance='a',task='like'}", values: "0+6x600"}
      - {series: "headrace_stream_feedback_late_total{instance='a',task='click'}", values: "0x600"}
    alert_rule_test:
      - {eval_time: 450m, alertname: HeadraceFeedbackShareFell, exp_alerts: []}
      - {eval_time: 450m, alertname: HeadraceFeedbackLate, exp_alerts: []}
      - {eval_time: 510m, alertname: HeadraceFeedbackGone, exp_alerts: []}
      - eval_time: 510m
        alertname: HeadraceFeedbackShareFell
        exp_alerts:
          - exp_labels: {severity: critical, task: click}
            exp_annotations:
              summary: "click has 0 positives in 15 minutes, less than a tenth of what it had for as many negatives
                in the six hours before"
              description: "Look for a service that no longer logs its feedback, a shipper that holds it back, or a
                changed key."
  - name: a quiet night, and a task whose positives are rare
    interval: 1m
    input_series:
      - {series: "headrace_stream_negatives_total{instance='a',task='order'}", values: "0+50x600"}
      - {series: "headrace_stream_positives_total{instance='a',task='order'}", values: "0x300 1x300"}
      - {series: "headrace_stream_feedback_late_total{instance='a',task='order'}", values: "0+0.1x600"}
      - {series: "headrace_ingest_feedback_delay_seconds{instance='g',type='order'}", values: "0.2x300 90x3 0.2x297"}
    alert_rule_test:
      - {eval_time: 500m, alertname: HeadraceFeedbackGone, exp_alerts: []}
      - {eval_time: 500m, alertname: HeadraceFeedbackShareFell, exp_alerts: []}
      - {eval_time: 500m, alertname: HeadraceFeedbackLate, exp_alerts: []}
      - {eval_time: 306m, alertname: HeadraceFeedbackDelayed, exp_alerts: []}
"""


def test_feedback_that_meets_no_impression_is_told(promtool):
    done = promtool(CASES)
    assert done.returncode == 0, done.stdout + done.stderr
