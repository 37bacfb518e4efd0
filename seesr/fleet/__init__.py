"""Many workers behind one address: jobs in Redis, files in an object store, Celery between them."""
