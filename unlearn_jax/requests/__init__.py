"""Requests to remove or correct training examples: they are read, carried out in order, logged, and shown.

request: reads requests from a file, one for each line
state: the training examples after some requests
log: the log of the requests that were carried out, a line for each, chained by hashes; and its verification
measure: losses of the forgotten examples, of their neighbours and of the others
page: an HTML page for each request
replay: the exact retraining, for requests whose edit is not accepted
carry_out: carries out requests on any model that is a `RequestTask`
"""
