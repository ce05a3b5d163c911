"""A short text of many kinds, for weights to be fitted to where nobody gives another one."""

SAMPLES = (
    """The harbour at Velden was founded by salt traders in the twelfth century , on a shallow bay that the north wind
spares . A stone quay followed in 1384 , paid for by a tax on herring , and with it came coopers , rope makers and
a school for pilots . The town lost its charter after the war of 1627 , when a garrison of four hundred men held the
upper gate for eleven weeks . Trade moved to the river mouth , and by 1750 the parish counted fewer than 900 people .

= = The lighthouse = =

The first light was a basket of burning peat on a pole . Its successor , a tower of 31 metres in red brick , was built
between 1861 and 1864 by the engineer Anna Reuther , who used a lens of the second order made in Paris . Keepers lived
there until 1979 ; since then the lamp has been electric and is watched from the capital . The tower is open to visitors
from May to September , and some 14 @,@ 000 people climb its 164 steps each year . In 2003 the council restored the
balcony and replaced the copper roof , which storms had damaged twice .""",
    """The ``open`` statement takes a path and an optional mode. If the file does not exist and the mode is ``"r"``, an
exception of type "FileNotFoundError" is raised; otherwise an empty file is created. Objects that support the buffer
protocol may be passed instead of a string. Note that the value of the expression is evaluated once, from left to right,
before the target is assigned to, and that a name which is bound anywhere in a block is local to the whole block.

   for_stmt ::= "for" target_list "in" expression_list ":" suite
                ["else" ":" suite]

See also section *Modules* for how a package is found. Changed in version 2.4: the argument *default* may be None.

def moving_average(values, width=3):
    \"\"\"Means of ``width`` neighbours; shorter by width - 1 than the input.\"\"\"
    if width < 1:
        raise ValueError(f"width: got {width}, wanted 1 or more")
    total, means = sum(values[:width]), []
    for i in range(width, len(values) + 1):
        means.append(total / width)
        if i < len(values):
            total += values[i] - values[i - width]
    return means
""",
    """Question: Why does bread rise?
Answer: Yeast eats the sugar in the dough and gives off carbon dioxide. The gas is caught in the gluten, the dough
swells, and in the oven the bubbles grow once more before the crust sets. If the dough is too cold, this takes longer.

Question: A train leaves at 14:35 and needs 2 hours and 50 minutes. When does it arrive?
Answer: At 17:25, because 14:35 plus two hours is 16:35, and fifty minutes more make 17:25.

Here is what you need for a simple soup:
1. two onions, one clove of garlic, a spoonful of oil
2. 500 g of carrots, cut into thin slices
3. one litre of water, salt, pepper and a pinch of cumin

"I'm not sure we should go," she said, and looked at the clouds over the hill. He laughed. "It's only rain. Besides, the
boat won't wait for us, and your brother has been asking about you all week." They took the old road down to the mill,
past the school and the empty shop, and didn't speak again until they could see the water.""",
    """{"name": "sensor-17", "status": "active", "readings": [21.4, 21.9, 22.3], "unit": "C", "updated": "2021-03-08"}
{"name": "sensor-18", "status": "failed", "readings": [], "unit": null, "updated": "2021-03-07"}

Dear Ms Okafor,

thank you for your letter of 9 June. We have checked the invoice and agree that the discount of 5 % was left out by
mistake. The corrected amount is EUR 1,284.50, which you will find on your account within ten days. Please let us know
whether we may send future invoices by email.

Climate models divide the atmosphere into cells and solve equations for the motion of air, for heat and for moisture in
each of them. The smaller the cells, the more a run costs: to halve their width takes about ten times the work. What is
smaller than a cell, such as a single cloud, has to be described by its average effect. Most of the differences between
models come from this step, and they are the reason why several are compared before a forecast is published.""",
)
