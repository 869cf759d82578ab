"""The server's metrics for Prometheus: https://prometheus.io/docs/instrumenting."""

HELP = {
    "requests_total": ("counter", "requests answered, by status"),
    "prompt_tokens_total": ("counter", "prompt tokens received"),
    "completion_tokens_total": ("counter", "tokens generated"),
    "passes_total": ("counter", "passes of the engine"),
    "pass_seconds_total": ("counter", "total duration of the passes in seconds"),
    "rows_waiting": ("gauge", "texts waiting for room in the batch"),
    "rows_running": ("gauge", "texts being generated now (the batch size)"),
    "seconds_per_token": ("histogram", "seconds from one token of a text to the next"),
}
BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def new_metrics():  # -> {(name, labels): number}
    return {("passes_total", ""): 0, ("pass_seconds_total", ""): 0.0}


def count(metrics, name, amount=1, labels=""):
    metrics[name, labels] = metrics.get((name, labels), 0) + amount


def observe(metrics, name, value, n=1):
    """Adds n values to a histogram. Each bound counts all values up to it."""
    for bound in BOUNDS:
        count(metrics, f"{name}_bucket", n * (value <= bound), f'{{le="{bound}"}}')
    count(metrics, f"{name}_bucket", n, '{le="+Inf"}')
    count(metrics, f"{name}_sum", n * value)
    count(metrics, f"{name}_count", n)


def render(metrics):  # -> the text of /metrics
    lines = []
    for name, (kind, words) in HELP.items():
        samples = {name, *(f"{name}_{end}" for end in ("bucket", "sum", "count"))}
        found = [item for item in metrics.copy().items() if item[0][0] in samples]
        if found:
            lines += [f"# HELP sixtygpt_{name} {words}", f"# TYPE sixtygpt_{name} {kind}"]
            lines += [f"sixtygpt_{sample}{labels} {value}" for (sample, labels), value in found]
    return "\n".join(lines) + "\n"


class Counted:
    """ASGI middleware that counts the answers by their status."""

    def __init__(self, app, metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send):
        async def send_counted(message):
            if message["type"] == "http.response.start":
                count(self.metrics, "requests_total", 1, f'{{status="{message["status"]}"}}')
            await send(message)

        await self.app(scope, receive, send_counted)
