"""The local page of `pixel-jax view`: curves and traces of runs, finished or still running.

tail: the complete lines of files that are being written
runs: what a run's directory holds
index: the traces of all runs, filtered and compared
app: the HTTP side
viewer.html, viewer.css, viewer.js, viewer.svg: the page
"""
