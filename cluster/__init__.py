"""The whole cluster as processes of this machine: for developers (``make cluster``) and for the tests; not shipped."""
