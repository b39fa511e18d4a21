"""``python -m deploy.check``: lint, render and hold to schemas and assertions what is shipped beside the code."""

import sys
import time
import traceback

from deploy import chart, composition, images, manifests, policies
from deploy.tally import Tally
from deploy.tools import fetch, run


def main() -> int:
    """Return 0 if every check holds; the last line has the figures."""
    tools = fetch()
    start = time.monotonic()
    tally = Tally()
    rendered: dict[str, list[manifests.Manifest]] = {}
    for part in (
        lambda: rendered.update(chart.check(tally, tools)),
        lambda: manifests.check(tally, rendered),
        lambda: policies.check(tally, rendered),
        lambda: composition.check(tally, tools),
        lambda: images.check(tally, tools),
    ):
        try:
            part()
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            # Something is not even there to be checked; the other parts are looked at all the same.
            tally.check(holds=False, what=f"missing or malformed: {traceback.format_exception(error)[-2:]}")
    for rule, reason in chart.SKIPPED.items():
        print(f"checkov's {rule} is left out: {reason}")
    custom = sum(document["kind"] in chart.CUSTOM_KINDS for documents in rendered.values() for document in documents)
    print(f"{custom} manifests of other operators' kinds have no schema here; they are held against assertions alone")
    versions = [run(tools[helm], "version", "--template", "{{.Version}}").output.strip("v\n") for helm in chart.HELMS]
    print(
        f"deploy-check: {tally} (helm {' and '.join(versions)}, {len(rendered)} values files, "
        f"{sum(map(len, rendered.values()))} manifests against Kubernetes {' and '.join(chart.KUBERNETES)}, "
        f"{len(composition.SERVICES) + 1} compose services, {len(images.DOCKERFILES)} Dockerfiles) "
        f"in {time.monotonic() - start:.0f} s"
    )
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
