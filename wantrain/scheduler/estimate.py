"""What a placement costs, roughly and in microseconds: the compass of the search. The simulator has the last word.

A placement is a grid of workers, a row per replica and a column per stage, and the cuts between the stages' layers.

    trip from a stage     of a single microbatch, from the start of its forward there to the end of its backward there
    a replica, n of them  trip of all + (n - 1) · the busiest link in one direction, or a worker's own line
                          trip of all - trip from s + n · computing on s, the worst stage s
                          trip of all + trip from s · (n / d - 1) where only d < n are in flight on s
                          trip of all - trip from s + one forward and backward on s + (d - 1) · pace of forwards up to s
                              + (n - 1) · pace of backwards from s on, where d forwards must come before the first
                              backward: in GPipe d = n
                          whichever is longest: fill + (n - 1) · period
    step                  the slowest replica, + what of the gradients' exchange is not hidden behind the last backwards
                          of earlier stages

Where lanes can be dealt freely, replicas finish together: the step is that for which the microbatches that all of them
get through add up to the batch. Lines that a whole site shares are added up over all that crosses them. Depths are what
memory allows. Where even one microbatch in flight does not fit, the cost grows with what is missing, so that a search
finds its way to what fits.

These are bounds of a flow shop (e.g. Pinedo, "Scheduling", on permutation flow shops), which a pipeline that runs deep
enough nearly reaches. Everything below is plain loops over flat sequences, see `native`.
"""

from __future__ import annotations

from wantrain.scheduler.problem import Problem, State

_LACKING, _MISSING = 0.1, 10.0
"""Chosen: what lacking memory costs at all, and by the share that is missing, as shares of the step and in units of
`Problem.strictness`: strict enough, none that fits is ever worse."""

_TIE = 0.003
"""Chosen: weight of the mean over workers beside the maximum: of two plans with the same slowest part the one that is
better elsewhere leads on to better ones."""


def size_stages(problem: Problem, state: State) -> None:
    """Add up the layers of each stage, from the cuts."""
    for s in range(problem.num_stages):
        a, b = state.cuts[s], state.cuts[s + 1]
        state.stage_forward[s] = problem.forward_flops[b] - problem.forward_flops[a]
        state.stage_backward[s] = problem.backward_flops[b] - problem.backward_flops[a]
        weights = problem.parameter_bytes[b] - problem.parameter_bytes[a]
        state.stage_weights[s] = weights
        state.stage_there[s] = problem.forward_bytes[b - 1] if s + 1 < problem.num_stages else 0.0
        state.stage_back[s] = problem.backward_bytes[b - 1] if s + 1 < problem.num_stages else 0.0
        largest = 0.0
        for layer in range(a, b):
            largest = max(largest, problem.largest_stored_bytes[layer])
        frozen = problem.frozen_bytes[b] - problem.frozen_bytes[a]
        state.stage_fixed[s] = problem.weight_copies * weights + frozen + largest
        if problem.num_replicas > 1:
            state.stage_fixed[s] += 4 * min(problem.bucket_bytes, weights)
        slope = problem.stored_bytes[b] - problem.stored_bytes[a] + state.stage_there[s] + state.stage_back[s]
        if s > 0:
            payloads = state.stage_there[s - 1] + state.stage_back[s - 1]
            slope += payloads
            state.stage_fixed[s] += (problem.least_depth[s - 1] - problem.least_depth[s]) * payloads
        state.stage_slope[s] = slope


def time_pipeline(problem: Problem, state: State, r: int) -> None:
    """Fill in a replica's fill and period, and its cells' trips and ways home."""
    num_stages, first = problem.num_stages, r * problem.num_stages
    count = state.counts[r] if problem.is_dealt else problem.num_microbatches / problem.num_replicas
    trip = line_period = 0.0
    for back in range(num_stages):
        s = num_stages - 1 - back
        w = state.cells[first + s]
        forward_s = state.stage_forward[s] * problem.s_per_flop[w]
        backward_s = state.stage_backward[s] * problem.s_per_flop[w]
        outgoing, incoming = state.stage_there[s], state.stage_back[s]
        back_s = 0.0
        if s + 1 < num_stages:
            v = state.cells[first + s + 1]
            there = problem.class_of[w] * problem.num_classes + problem.class_of[v]
            here = problem.class_of[v] * problem.num_classes + problem.class_of[w]
            there_s = outgoing * problem.s_per_byte[there]
            back_s = incoming * problem.s_per_byte[here]
            trip += there_s + problem.latency_s[there] + back_s + problem.latency_s[here]
            line_period = max(line_period, there_s)
        if s > 0:
            outgoing += state.stage_back[s - 1]
            incoming += state.stage_there[s - 1]
        line_period = max(line_period, outgoing * problem.up_s_per_byte[w], incoming * problem.down_s_per_byte[w])
        trip += forward_s + backward_s
        state.trip_s[first + s], state.busy_s[first + s] = trip, back_s
    period, own = line_period, trip + (count - 1) * line_period
    home = forward_pace = backward_pace = 0.0
    for s in range(num_stages):
        w = state.cells[first + s]
        forward_s = state.stage_forward[s] * problem.s_per_flop[w]
        backward_s = state.stage_backward[s] * problem.s_per_flop[w]
        head = trip - state.trip_s[first + s]
        busy = head + count * (forward_s + backward_s)
        if busy > own:
            period, own = forward_s + backward_s, busy
        answers = trip + (count - 1) * state.busy_s[first + s]
        if answers > own:
            period, own = state.busy_s[first + s], answers
        forward_pace, backward_pace = max(forward_pace, forward_s), max(backward_pace, backward_s)
        ahead = min(problem.least_depth[s], count)
        turned = head + forward_s + backward_s + (ahead - 1) * forward_pace
        ordered = turned + (count - 1) * backward_pace
        if ordered > own:
            period, own = backward_pace + (forward_pace if ahead == count else 0.0), ordered
        state.home_s[first + s], state.turned_s[first + s] = home, turned
        state.busy_s[first + s] = max(busy, answers)
        state.end_s[first + s] = trip + (count - 1) * line_period
        state.link_s[s] = 0.0
        if s + 1 < num_stages:
            v = state.cells[first + s + 1]
            here = problem.class_of[v] * problem.num_classes + problem.class_of[w]
            back_s = state.stage_back[s] * problem.s_per_byte[here]
            there = problem.class_of[w] * problem.num_classes + problem.class_of[v]
            there_s = state.stage_there[s] * problem.s_per_byte[there]
            forward_pace, backward_pace = max(forward_pace, there_s), max(backward_pace, back_s)
            state.link_s[s] = back_s
            home += backward_s + back_s + problem.latency_s[here]
    time_ends(problem, state, first, count)
    for s in range(num_stages):
        state.home_s[first + s] += own - state.end_s[first + s]
    state.period_s[r] = max(period, 1e-12)
    state.fill_s[r] = own - (count - 1) * state.period_s[r]


def time_ends(problem: Problem, state: State, first: int, count: float) -> None:
    """Fill in when the pipeline ends if nothing holds it up but what each cell has to wait for.

    The innermost loop of all; comparisons, since a call of `max` takes three times as long.
    """
    for s in range(problem.num_stages):
        state.pace_s[s] = state.stage_backward[s] * problem.s_per_flop[state.cells[first + s]]
    for k in range(problem.num_stages):
        pace, busy, turned = state.pace_s[k], state.busy_s[first + k], state.turned_s[first + k]
        for back in range(k + 1):
            s = k - back
            if state.pace_s[s] > pace:
                pace = state.pace_s[s]
            if s < k and state.link_s[s] > pace:
                pace = state.link_s[s]
            end = turned + (count - 1) * pace
            if busy > end:
                end = busy
            if end > state.end_s[first + s]:
                state.end_s[first + s] = end


def time_reduction(problem: Problem, state: State, s: int) -> None:
    """Fill in what a stage's workers need after their last backward, and what memory they have."""
    num_replicas, num_stages = problem.num_replicas, problem.num_stages
    num_present = 0
    for r in range(num_replicas):
        c = problem.class_of[state.cells[r * num_stages + s]]
        if state.num_present[c] == 0:
            state.present[num_present] = c
            num_present += 1
        state.num_present[c] += 1
    weights = state.stage_weights[s]
    piece = weights * problem.wire_bytes_per_parameter_byte / num_replicas
    num_buckets = max(1.0, weights / problem.bucket_bytes)
    window = answer = 0.0
    for i in range(num_present):
        a, worst, last = state.present[i], 0.0, 0.0
        for j in range(num_present):
            b = state.present[j]
            if a != b or state.num_present[a] > 1:
                link = a * problem.num_classes + b
                worst = max(worst, 2 * piece * problem.s_per_byte[link] + problem.latency_s[link])
                last = max(last, piece / num_buckets * problem.s_per_byte[link] + problem.latency_s[link])
                window = max(window, problem.window_bytes[link])
        state.exchange_s[a], state.last_s[a] = worst, last
        answer = max(answer, last)
    for i in range(num_present):
        state.num_present[state.present[i]] = 0
    in_all = 2 * piece * (num_replicas - 1)
    for r in range(num_replicas):
        w = state.cells[r * num_stages + s]
        exchange_s = state.exchange_s[problem.class_of[w]]
        exchange_s = max(exchange_s, in_all * problem.up_s_per_byte[w], in_all * problem.down_s_per_byte[w])
        hidden_s = state.stage_backward[s] * problem.s_per_flop[w] * (1 - 1 / num_buckets)
        optimizer_s = weights * problem.optimizer_flops_per_parameter_byte * problem.s_per_flop[w]
        last_s = state.last_s[problem.class_of[w]] + answer
        state.reduce_s[r * num_stages + s] = max(exchange_s - hidden_s, last_s) + optimizer_s
    state.stage_window[s] = 2 * (num_replicas - 1) * window
    fit_stage(problem, state, s)


def fit_stage(problem: Problem, state: State, s: int) -> None:
    """Fill in the least memory that a stage's workers have beside the staging of the channels to their neighbours."""
    num_stages = problem.num_stages
    least = 1e30
    for r in range(problem.num_replicas):
        w = state.cells[r * num_stages + s]
        room = problem.memory[w]
        if s > 0:
            room -= line_window(problem, w, state.cells[r * num_stages + s - 1])
        if s + 1 < num_stages:
            room -= line_window(problem, w, state.cells[r * num_stages + s + 1])
        least = min(least, room)
    state.stage_room[s] = least


def line_window(problem: Problem, w: int, v: int) -> float:
    """Return what staging takes on either end of a boundary: two channels, both with a window in each direction."""
    there = problem.window_bytes[problem.class_of[w] * problem.num_classes + problem.class_of[v]]
    here = problem.window_bytes[problem.class_of[v] * problem.num_classes + problem.class_of[w]]
    return float(4 * max(there, here))


def site_lines_s(problem: Problem, state: State) -> float:
    """Return how long the busiest line of a site is taken by all that crosses it in a step."""
    num_stages, num_replicas = problem.num_stages, problem.num_replicas
    for z in range(len(state.site_out)):
        state.site_out[z] = state.site_in[z] = 0.0
    for r in range(num_replicas):
        count = state.counts[r] if problem.is_dealt else problem.num_microbatches / num_replicas
        for s in range(num_stages - 1):
            z = problem.site_of[state.cells[r * num_stages + s]]
            y = problem.site_of[state.cells[r * num_stages + s + 1]]
            if z != y:
                there, back = count * state.stage_there[s], count * state.stage_back[s]
                state.site_out[z] += there
                state.site_in[y] += there
                state.site_out[y] += back
                state.site_in[z] += back
    for s in range(num_stages):
        piece = 2 * state.stage_weights[s] * problem.wire_bytes_per_parameter_byte / num_replicas
        for r in range(num_replicas):
            z = problem.site_of[state.cells[r * num_stages + s]]
            outside = 0
            for q in range(num_replicas):
                if problem.site_of[state.cells[q * num_stages + s]] != z:
                    outside += 1
            state.site_out[z] += piece * outside
            state.site_in[z] += piece * outside
    busiest = 0.0
    for z in range(len(state.site_out)):
        busiest = max(busiest, state.site_out[z] * problem.site_up_s_per_byte[z])
        busiest = max(busiest, state.site_in[z] * problem.site_down_s_per_byte[z])
    return busiest


def choose_limits(problem: Problem, state: State) -> float:
    """Fill in how deep memory lets each stage run ahead; return the share of memory that is missing."""
    window = missing = 0.0
    for s in range(problem.num_stages):
        window = max(window, state.stage_window[s])
    depth = problem.max_depth[0]
    for s in range(problem.num_stages):
        slope, least = state.stage_slope[s], problem.least_depth[s]
        depth = min(depth, problem.max_depth[s])
        room = state.stage_room[s] - state.stage_fixed[s] - window
        if room < least * slope:
            missing += (least * slope - room) / (least * slope + state.stage_fixed[s] + window)
            depth = least
        elif room < depth * slope:
            depth = int(room / slope)
        state.limit[s] = depth
    return missing


def price(problem: Problem, state: State) -> float:
    """Return the estimated seconds of a step, from what the functions above have filled in."""
    num_stages, num_replicas = problem.num_stages, problem.num_replicas
    share = problem.num_microbatches / num_replicas
    missing = choose_limits(problem, state)
    throughput = done = longest = mean = 0.0
    for r in range(num_replicas):
        count = state.counts[r] if problem.is_dealt else share
        period = state.period_s[r]
        own = state.fill_s[r] + (count - 1) * period
        trip = state.trip_s[r * num_stages]
        for s in range(num_stages):
            if state.limit[s] < count:
                here = state.trip_s[r * num_stages + s]
                waiting = trip + here * (count / state.limit[s] - 1)
                if waiting > own:
                    period, own = here / state.limit[s], waiting
        state.done_s[r] = own
        longest = max(longest, own if problem.is_dealt else trip)
        throughput += 1 / period
        done += own / period - count
    if not problem.is_dealt:
        longest = max(longest, (problem.num_microbatches + done) / throughput)
    step_s = 0.0
    for r in range(num_replicas):
        own = state.done_s[r] if problem.is_dealt else longest
        for s in range(num_stages):
            cell = r * num_stages + s
            ends = own - state.home_s[cell] + state.reduce_s[cell]
            step_s = max(step_s, ends)
            mean += ends / num_stages
    if problem.has_site_limits:
        step_s = max(step_s, state.fill_s[0] + site_lines_s(problem, state))
    step_s += _TIE * mean / num_replicas
    if missing > 0:
        step_s *= 1 + problem.strictness * (_LACKING + _MISSING * missing)
    return step_s


def price_all(problem: Problem, state: State) -> float:
    """Return the estimate of a placement from nothing but its cells, cuts and counts."""
    size_stages(problem, state)
    for r in range(problem.num_replicas):
        time_pipeline(problem, state, r)
    for s in range(problem.num_stages):
        time_reduction(problem, state, s)
    return price(problem, state)


HELPERS = (
    size_stages,
    time_ends,
    time_pipeline,
    line_window,
    fit_stage,
    time_reduction,
    site_lines_s,
    choose_limits,
    price,
)
"""What `price_all` calls, and what a search calls beside it: in the order in which they need each other."""
