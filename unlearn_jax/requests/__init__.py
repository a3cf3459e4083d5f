"""Requests that a person files: read, carried out in order, logged, and shown.

request: one line of a file of requests
state: the training examples as they are after some requests
log: one line a request that was carried out, chained by hashes, and its verification
measure: losses of the forgotten examples, of their neighbours and of the others
page: one HTML page a request
replay: the exact retraining, for requests whose edit is not accepted
carry_out: all of these in order, for any model that is a `RequestTask`
"""
