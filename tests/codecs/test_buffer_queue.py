from wantrain.codecs.buffer_queue import UseQueue


def test_the_window_slides_as_samples_are_used() -> None:
    queue = UseQueue(capacity=2)
    queue.replace([7, 3, 9, 1])
    assert list(queue.window) == [7, 3]
    queue.used(7)
    assert list(queue.window) == [3, 9]


def test_a_sample_that_comes_again_stays() -> None:
    queue = UseQueue(capacity=2)
    queue.replace([7, 3, 7, 1])
    queue.used(7)
    assert list(queue.window) == [3, 7]


def test_what_is_promised_comes_before_what_is_announced() -> None:
    queue = UseQueue(capacity=2)
    queue.replace([7, 3])
    assert queue.promise(3)
    queue.replace([9, 1])
    assert list(queue.window) == [3, 9]
    queue.withdraw(3)
    assert list(queue.window) == [9, 1]


def test_no_more_is_promised_than_there_is_room_for() -> None:
    queue = UseQueue(capacity=1)
    assert queue.promise(7)
    assert queue.promise(7)
    assert not queue.promise(3)


def test_what_is_asked_for_comes_first_and_not_once_more() -> None:
    queue = UseQueue(capacity=9)
    queue.replace([7, 3, 8, 3])
    queue.put_first([3, 5])
    assert list(queue.window) == [3, 5, 7, 8]
    queue.used(3)
    assert list(queue.window) == [5, 7, 8, 3]
