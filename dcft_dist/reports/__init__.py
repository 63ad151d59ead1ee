"""Reports, tables and model cards of finished runs, built from the files in their run directories.

`write_report(run)` (in `reports.run_report`) writes `report.html`.
"""
