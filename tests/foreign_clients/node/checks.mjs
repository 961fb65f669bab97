// Runs the checks of a client's file: `node FILE URL MODEL`. For each check, one line of JSON is printed.
export async function run(checksOf) {
  const [url, model] = process.argv.slice(2);
  for (const [check, work] of Object.entries(checksOf(url, model))) {
    let error = null;
    try {
      await work();
    } catch (raised) {
      console.error(raised);
      error = `${raised.name}: ${raised.message}`;
    }
    console.log(JSON.stringify({ check, error }));
  }
}
