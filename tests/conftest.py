"""What holds for every test."""

from hypothesis import settings

# The same examples in every run, so that a failure is the change's and can be seen again; and no limit on an example's
# time, which a busy machine would break.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
