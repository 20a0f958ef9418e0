"""The texts that activations are measured on when a language model is quantized (see ``smooth``).

Rules: written for this purpose and fixed: a changed letter changes the bytes of every model that is built.  They are meant to
stir what a small chat model meets: prose, a list, code, numbers, a table, other scripts, a conversation.
"""

from edge_agent.core.chat import ChatMessage

PROSE = """\
The harbour was quiet when Ines came down the stairs with the radio under her arm. Three boats were still out, and the wind,
which had been kind all morning, had begun to turn. "They will see the light," said the old man on the bench, "if somebody
remembers to switch it on." She laughed, although she was not sure that he was joking. In 1962 the lamp had burned paraffin;
now a board no larger than a playing card kept the time, read the tide gauge and decided, 24 times an hour, how bright it
had to be. It used 3.5 watts. Her grandfather used to say that a lighthouse is a promise: it costs little to make and a great
deal to break.

There are four things to check before a storm:
1. the battery (above 12.4 V),
2. the spare bulb in the second drawer,
3. the rope at the north door, and
4. whether anyone has fed the cat.

The function that measured the tide was short enough to learn by heart:

def mean_level(samples, width=16):
    \"\"\"Average the last readings, in centimetres.\"\"\"
    recent = samples[-width:]
    if not recent:
        raise ValueError("no samples yet")
    return sum(recent) / len(recent)

for hour, level in enumerate([112, 118, 131, 140, 138]):
    print(f"{hour:02d}:00 -> {level} cm")

Water boils at 100 degrees Celsius at sea level, yet on a high mountain it boils sooner, because the air presses on it less. That
is why rice takes longer there. Scientists call this a phase transition; cooks call it a nuisance. The capital of Portugal is
Lisbon, the largest planet is Jupiter, and 7 * 8 = 56. Bonjour, wie geht es Ihnen? Привет. 你好。 {"name": "Pip", "age": 7}
"""

TALK = (
    ChatMessage("user", "Tell me in a few sentences why the sky is blue, and then write one line of Python that prints it."),
    ChatMessage(
        "assistant",
        "Sunlight is a mixture of all colors. When it meets the air, the short waves are scattered much more than the long "
        "ones, so blue light reaches us from every part of the sky, while red light goes straight on. At sunset the path "
        'through the air is longer, and most of the blue has been lost on the way.\n\n```python\nprint("The sky is blue.")\n```',
    ),
    ChatMessage("user", "Thank you! What should I cook tonight? I have rice, two eggs and a tomato."),
    ChatMessage(
        "assistant",
        "You could make egg fried rice: cook the rice, let it cool, fry the chopped tomato with a little salt, add the rice, "
        "and stir in the beaten eggs until they are just set. It takes about fifteen minutes and serves one hungry person.",
    ),
)
