"""Reports, tables and model cards, made from the files of finished runs.

`write_report(run)` (in `reports.run_report`) writes `report.html`.
"""
