"""Many workers behind one address: jobs in Redis, files in an object store, Celery between them."""

ORDERS = {  # of `seesr fleet`
    "status": "every worker's state, job, bundle, version and GPU memory, and the queue, as JSON",
    "drain": "take no more jobs, and return once the running one has ended",
    "resume": "take jobs again",
    "unload": "drain, then free the GPU without ending the worker",
    "load": "load the weights again, then take jobs",
    "restart": "drain, then stop the worker; systemd or Compose starts it again",
}
